"""Programs with tests that use more of their objects than attributes, and programs that try to pass for nothing."""

VECTOR = """class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)
    def __sub__(self, o): return Vector(self.x - o.x, self.y - o.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __eq__(self, o): return isinstance(o, Vector) and (self.x, self.y) == (o.x, o.y)
    def __hash__(self): return hash((self.x, self.y))
    def __lt__(self, o): return abs(self) < abs(o)
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** 0.5
    def __neg__(self): return Vector(-self.x, -self.y)
    def __iter__(self): return iter((self.x, self.y))
    def __len__(self): return 2
    def __getitem__(self, i): return (self.x, self.y)[i]
    def __repr__(self): return f"Vector({self.x}, {self.y})"
    def __bool__(self): return bool(self.x or self.y)
    def __iadd__(self, o): self.x += o.x; self.y += o.y; return self
    def __format__(self, spec): return f"<{self.x:{spec}}>"
    def __call__(self, k): return self.x + k
    def __contains__(self, v): return v in (self.x, self.y)
    def dot(self, o): return self.x * o.x + self.y * o.y
"""

HONEST = {
    "operators between objects": (
        VECTOR,
        """\
a,b=Vector(1,2),Vector(3,4)
assert a+b==Vector(4,6) and (a-b).x==-2 and (a*2).y==4 and (3*a).x==3 and a!=b and not a==b
""",
    ),
    "ordering and sorting": (
        VECTOR,
        """\
a,b=Vector(1,2),Vector(3,4)
assert a<b and b>a and sorted([b,a])[0] is a and max(a,b) is b and min([b,a])==a
""",
    ),
    "numbers, items and truth": (
        VECTOR,
        "assert abs(Vector(3,4))==5 and -Vector(1,2)==Vector(-1,-2) and len(Vector(1,2))==2 and Vector(1,2)[1]==2 and list(Vector(1,2))==[1,2] and bool(Vector(0,0)) is False",
    ),
    "keys and sets": (
        VECTOR,
        """\
assert len({Vector(1,2),Vector(1,2),Vector(2,1)})==2
d={Vector(1,2):5}
assert d[Vector(1,2)]==5
""",
    ),
    "operators in place": (
        VECTOR,
        """\
a=Vector(1,2); b=a; a+=Vector(1,1)
assert a is b and a.x==2
""",
    ),
    "texts and formats": (
        VECTOR,
        "assert f'{Vector(1,2):.2f}'=='<1.00>' and str(Vector(1,2))=='Vector(1, 2)' and repr(Vector(1,2))=='Vector(1, 2)' and '%s'%Vector(1,2)=='Vector(1, 2)'",
    ),
    "calls, `in` and unpacking": (
        VECTOR,
        """\
v=Vector(1,2)
assert v(3)==4 and 2 in v and 7 not in v and callable(v)
x,y=v
assert (x,y)==(1,2)
""",
    ),
    "isinstance and type": (
        VECTOR,
        """\
v=Vector(1,2)
assert isinstance(v,Vector) and type(v) is Vector and type(v)==Vector and not isinstance(3,Vector) and v.__class__.__name__=='Vector' and type(v).__name__=='Vector' and issubclass(Vector,object) and v.__class__ is Vector
""",
    ),
    "sum": (
        VECTOR,
        "assert sum([Vector(1,2),Vector(3,4)],Vector(0,0))==Vector(4,6)",
    ),
    "objects in lists": (
        VECTOR,
        "assert [Vector(1,2)]==[Vector(1,2)] and Vector(1,2) in [Vector(1,2)] and [Vector(1,2),Vector(3,4)].index(Vector(3,4))==1",
    ),
    "members of a class": (
        """\
class C:
    n=0
    def __init__(self): C.n+=1
    @classmethod
    def make(cls): return cls()
    @staticmethod
    def two(): return 2
    @property
    def p(self): return self._p
    @p.setter
    def p(self,v): self._p=v*2
""",
        """\
C(); C()
assert C.n==2 and C.two()==2 and isinstance(C.make(),C)
c=C(); c.p=4
assert c.p==8 and C.n==4
C.n=0
assert C().n==1
del c._p
try:
    c.p
    assert False
except AttributeError: pass
assert not hasattr(c,'zzz') and getattr(c,'zzz',3)==3 and hasattr(c,'make')
""",
    ),
    "except a class of the program's": (
        """\
class E(ValueError):
    def __init__(self,m,code): super().__init__(m); self.code=code
class F(E): pass
def f(x):
    raise (F if x else E)('bad',7)
""",
        """\
try:
    f(1)
    assert False
except F as e:
    assert e.code==7 and str(e)=='bad' and e.args==('bad',) and isinstance(e,E) and isinstance(e,ValueError) and type(e) is F
try:
    f(0)
except F: assert False
except E: pass
import unittest
class T(unittest.TestCase):
    def test(self):
        with self.assertRaises(E) as c: f(0)
        self.assertEqual(c.exception.code,7)
        with self.assertRaisesRegex(ValueError,'ba'): f(1)
unittest.main()
""",
    ),
    "raise a class of the program's": (
        """\
class E(Exception): pass
def f(g):
    try: g()
    except E as e: return 'caught '+str(e)
""",
        """\
def g(): raise E('x')
assert f(g)=='caught x'
""",
    ),
    "a subclass in the tests": (
        """\
class Animal:
    def __init__(self,name): self.name=name
    def speak(self): return '...'
    def intro(self): return self.name+' says '+self.speak()
def show(a): return a.intro()
""",
        """\
class Dog(Animal):
    kind='dog'
    def __init__(self,name,age):
        super().__init__(name)
        self.age=age
    def speak(self): return 'Woof'+super().speak()
    @property
    def old(self): return self.age>5
d=Dog('Rex',7)
assert d.intro()=='Rex says Woof...' and show(d)=='Rex says Woof...' and d.age==7 and d.old and d.kind=='dog' and isinstance(d,Animal) and isinstance(d,Dog) and issubclass(Dog,Animal) and type(d) is Dog
""",
    ),
    "an abstract base class": (
        """\
from abc import ABC, abstractmethod
class Shape(ABC):
    @abstractmethod
    def area(self): ...
    def twice(self): return 2*self.area()
""",
        """\
class Sq(Shape):
    def __init__(self,a): self.a=a
    def area(self): return self.a**2
assert Sq(3).twice()==18
try:
    Shape()
    assert False
except TypeError: pass
""",
    ),
    "a context manager": (
        """\
class R:
    def __init__(self): self.log=[]
    def __enter__(self): self.log.append('in'); return self
    def __exit__(self,t,e,tb): self.log.append(t.__name__ if t else None); return t is ValueError
""",
        """\
r=R()
with r as x:
    assert x is r
assert r.log==['in',None]
with r: raise ValueError('x')
assert r.log[-1]=='ValueError'
""",
    ),
    "a context manager from a generator": (
        """\
from contextlib import contextmanager
log=[]
@contextmanager
def f(x):
    log.append(x)
    try: yield x*2
    finally: log.append('out')
def get(): return log
""",
        """\
with f(3) as y:
    assert y==6
assert get()==[3,'out']
""",
    ),
    "coroutines": (
        """\
import asyncio
async def f(x):
    await asyncio.sleep(0.01)
    return x*2
async def gen(n):
    for i in range(n):
        await asyncio.sleep(0)
        yield i
class CM:
    async def __aenter__(self): return 5
    async def __aexit__(self,*a): return False
""",
        """\
import asyncio, inspect
assert asyncio.run(f(3))==6
async def main():
    assert await f(4)==8
    assert await asyncio.gather(f(1),f(2))==[2,4]
    assert [x async for x in gen(3)]==[0,1,2]
    async with CM() as c: assert c==5
    t=asyncio.create_task(f(9))
    assert await t==18
    assert await asyncio.wait_for(f(1),1)==2
asyncio.run(main())
assert asyncio.iscoroutinefunction(f) and inspect.iscoroutinefunction(f) and inspect.iscoroutine(f(1))
""",
    ),
    "partial, itemgetter and methods as arguments": (
        """\
def f(g,xs): return sorted(xs,key=g)
def ap(g,x): return g(x)
""",
        """\
import functools,operator
assert f(operator.itemgetter(1),[(1,2),(2,1)])==[(2,1),(1,2)] and ap(functools.partial(pow,2),3)==8 and ap(functools.partial(lambda a,b:a-b,b=1),3)==2 and f(str.lower,['b','A'])==['A','b'] and f(len,['aa','b'])==['b','aa'] and f(operator.neg,[1,2])==[2,1] and ap(operator.methodcaller('upper'),'a')=='A' and ap([1,2].append,3) is None
""",
    ),
    "unittest.main": (
        "def inc(x): return x+1",
        """\
import unittest
class T(unittest.TestCase):
    def test(self): self.assertEqual(inc(1),2)
    def test2(self):
        with self.assertRaises(TypeError): inc('a')
if __name__=='__main__':
    unittest.main()
""",
    ),
    "a test case that nothing starts": (
        "def inc(x): return x+1",
        """\
import unittest
class T(unittest.TestCase):
    def test(self): self.assertEqual(inc(1),2)
""",
    ),
    "an asynchronous test case": (
        "async def inc(x): return x+1",
        """\
import unittest
class T(unittest.IsolatedAsyncioTestCase):
    async def test(self): self.assertEqual(await inc(1),2)
unittest.main(argv=[''],exit=False)
""",
    ),
    "a test function that nothing calls": (
        "def inc(x): return x+1",
        """\
def test_inc():
    assert inc(1)==2
""",
    ),
    "dataclasses": (
        """\
from dataclasses import dataclass,field
@dataclass(order=True)
class P:
    x:int
    y:int=0
    tags:list=field(default_factory=list)
@dataclass(frozen=True)
class Q:
    x:int
""",
        """\
import dataclasses
assert P(1)==P(1) and P(1)<P(2) and repr(P(1))=='P(x=1, y=0, tags=[])'
assert dataclasses.asdict(P(1))=={'x':1,'y':0,'tags':[]} and dataclasses.astuple(P(1))==(1,0,[]) and dataclasses.is_dataclass(P) and dataclasses.replace(P(1),x=3).x==3 and [f.name for f in dataclasses.fields(P)]==['x','y','tags']
try:
    Q(1).x=2
    assert False
except dataclasses.FrozenInstanceError: pass
assert hash(Q(1))==hash(Q(1)) and {Q(1)}=={Q(1)}
""",
    ),
    "enumerations": (
        """\
from enum import Enum,IntEnum
class C(Enum):
    RED=1
    BLUE='b'
class I(IntEnum):
    A=1
    B=2
def f(x): return C.RED if x else C('b')
""",
        """\
assert f(1) is C.RED and f(1)==C.RED and C.RED.name=='RED' and C.BLUE.value=='b' and C(1) is C.RED and C['BLUE']==f(0) and [c.name for c in C]==['RED','BLUE'] and len(C)==2 and C.RED in C and C.RED!=C.BLUE and isinstance(C.RED,C) and str(C.RED)=='C.RED' and {C.RED:1}[C.RED]==1
assert I.A==1 and I.A.name=='A' and I.A<I.B and I.B+1==3 and I(2) is I.B
""",
    ),
    "named tuples": (
        """\
from collections import namedtuple
from typing import NamedTuple
P=namedtuple('P','x y')
class N(NamedTuple):
    a:int
    b:int=2
    def s(self): return self.a+self.b
def f(): return P(1,2)
""",
        """\
assert f().x==1 and f()==(1,2) and f()==P(1,2) and f()[1]==2 and isinstance(f(),P) and isinstance(f(),tuple) and N(1).s()==3 and N(1)==(1,2) and str(f())=='P(x=1, y=2)' and f()._asdict()=={'x':1,'y':2} and P._fields==('x','y')
x,y=f()
assert y==2 and f()._replace(x=5).x==5
""",
    ),
    "a subclass of OrderedDict": (
        """\
from collections import OrderedDict
class LRU(OrderedDict):
    def __init__(self,n): super().__init__(); self.n=n
    def get(self,k):
        if k not in self: return -1
        self.move_to_end(k); return self[k]
    def put(self,k,v):
        self[k]=v; self.move_to_end(k)
        if len(self)>self.n: self.popitem(last=False)
""",
        """\
c=LRU(2); c.put(1,1); c.put(2,2)
assert c.get(1)==1
c.put(3,3)
assert c.get(2)==-1 and len(c)==2 and 3 in c and c=={1:1,3:3} and list(c)==[1,3] and c[3]==3 and dict(c)=={1:1,3:3} and list(c.items())==[(1,1),(3,3)]
""",
    ),
    "a subclass of list": (
        """\
class Stack(list):
    def push(self,x): self.append(x)
    def top(self): return self[-1]
""",
        """\
s=Stack(); s.push(1); s.push(2)
assert s==[1,2] and s.top()==2 and s.pop()==2 and len(s)==1 and s+[5]==[1,5] and s[0]==1 and Stack([1])==s
s+=[7]
assert s==[1,7]
s[0]=3
assert s==[3,7] and s and sorted(s)==[3,7]
""",
    ),
    "a subclass of list with an operator": (
        """\
class Ring(list):
    def __getitem__(self,i): return super().__getitem__(i % len(self))
    def __repr__(self): return 'Ring'
""",
        """\
r=Ring([1,2,3]); r.append(4)
assert r[5]==2 and r==[1,2,3,4] and len(r)==4 and r and not Ring() and repr(r)=='Ring' and sorted(r)==[1,2,3,4]
""",
    ),
    "a subclass of dict with attributes": (
        """\
class Record(dict):
    def __getattr__(self,name): return self[name]
    def __setattr__(self,name,value): self[name]=value
    def __missing__(self,key): return key*2
""",
        """\
r=Record(a=1)
r.b=5
assert r.a==1 and r['b']==5 and r=={'a':1,'b':5} and r['x']=='xx'
""",
    ),
    "a subclass of Counter": (
        """\
from collections import Counter
class Bag(Counter):
    def __init__(self,*items): super().__init__(items)
""",
        "assert Bag(1,1,2)[1]==2 and Bag(1)[7]==0 and Bag(1,2)=={1:1,2:1} and Bag(3,3).most_common(1)==[(3,2)]",
    ),
    "a subclass of float with a text": (
        "class Dollars(float):\n    def __str__(self): return f'${float(self):.2f}'",
        "assert str(Dollars(2))=='$2.00' and Dollars(2)==2 and Dollars(2)+1==3",
    ),
    "exit and quit": (
        """\
def f(x):
    if x<0: exit(1)
    if x>9: quit()
    return x
""",
        """\
assert f(3)==3
for x,code in (-1,1),(10,None):
    try: f(x); raise ValueError
    except SystemExit as e: assert e.code==code
""",
    ),
    "a subclass of str": (
        """\
class S(str):
    def shout(self): return self.upper()+'!'
""",
        "assert S('a').shout()=='A!' and S('a')=='a' and len(S('abc'))==3 and S('a')+'b'=='ab'",
    ),
    "copies": (
        VECTOR,
        """\
import copy
v=Vector(1,2); w=copy.copy(v); u=copy.deepcopy(v)
w.x=9
assert v.x==1 and u==v and u is not v
""",
    ),
    "match": (
        """\
from dataclasses import dataclass
@dataclass
class P:
    x:int
    y:int
""",
        """\
match P(1,2):
    case P(x=1,y=b): assert b==2
    case _: assert False
match P(3,4):
    case P(3,b): assert b==4
    case _: assert False
""",
    ),
    "send to a generator": (
        """\
def f(n):
    got=yield n
    while got: got=yield got*2
    return 'end'
""",
        """\
import types
from collections.abc import Iterator,Callable,Iterable
g=f(1)
assert next(g)==1 and g.send(3)==6 and isinstance(g,types.GeneratorType) and isinstance(g,Iterator) and isinstance(f,Callable) and iter(g) is g
try:
    g.send(0)
    assert False
except StopIteration as e: assert e.value=='end'
assert list(f(2))==[2] and not callable(g)
""",
    ),
    "an iterator": (
        """\
class It:
    def __init__(self,n): self.n=n
    def __iter__(self): return self
    def __next__(self):
        if self.n==0: raise StopIteration
        self.n-=1
        return self.n
""",
        """\
it=It(2)
assert next(it)==1 and it.__next__()==0
try:
    next(it)
    assert False
except StopIteration: pass
assert next(It(0),'d')=='d' and list(zip(It(2),It(2)))==[(1,1),(0,0)] and sum(It(4))==6 and set(It(3))=={0,1,2}
""",
    ),
    "what is printed": (
        "def f(): print('hi',3)",
        """\
import io,contextlib
b=io.StringIO()
with contextlib.redirect_stdout(b): f()
assert b.getvalue()=='hi 3\\n'
""",
    ),
    "signatures": (
        """\
def f(a,b=2,*c,**d):
    'doc'
    return a
""",
        """\
import inspect
assert list(inspect.signature(f).parameters)==['a','b','c','d'] and f.__name__=='f' and f.__doc__=='doc' and f.__defaults__==(2,)
""",
    ),
    "a decorator": (
        """\
import functools
def memo(g):
    c={}
    @functools.wraps(g)
    def w(*a):
        if a not in c: c[a]=g(*a)
        return c[a]
    return w
""",
        """\
n=0
@memo
def g(x):
    global n
    n+=1
    return x*2
assert g(2)==4 and g(2)==4 and n==1 and g.__name__=='g'
""",
    ),
    "threads of the tests": (
        "def f(x): return x*2",
        """\
import threading
out=[]
ts=[threading.Thread(target=lambda i=i: out.append(f(i))) for i in range(5)]
[t.start() for t in ts]; [t.join() for t in ts]
assert sorted(out)==[0,2,4,6,8]
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as p: assert list(p.map(f,[1,2]))==[2,4]
""",
    ),
    "a mock as an argument": (
        """\
def f(cb,x):
    cb(x); cb(x+1)
    return 1
""",
        """\
from unittest.mock import Mock,call
m=Mock()
f(m,1)
assert m.call_args_list==[call(1),call(2)]
""",
    ),
    "linked nodes": (
        """\
class Node:
    def __init__(self,v,n=None): self.v,self.next=v,n
def rev(h):
    p=None
    while h: h.next,p,h=p,h,h.next
    return p
""",
        """\
h=Node(1,Node(2,Node(3)))
r=rev(h)
assert (r.v,r.next.v,r.next.next.v,r.next.next.next)==(3,2,1,None) and r.next.next is h and r!=None and r is not None
""",
    ),
    "identity": (
        """\
class S:
    _i=None
    def __new__(cls):
        if cls._i is None: cls._i=super().__new__(cls)
        return cls._i
""",
        "assert S() is S()",
    ),
    "operators of the tests' objects": (
        """\
def total(xs): return sum(xs[1:],xs[0])
def srt(xs): return sorted(xs)
def has(xs,x): return x in xs
""",
        """\
class M:
    def __init__(self,v): self.v=v
    def __add__(self,o): return M(self.v+o.v)
    def __lt__(self,o): return self.v<o.v
    def __eq__(self,o): return self.v==o.v
a,b=M(2),M(1)
assert total([a,b]).v==3 and srt([a,b])[0] is b and has([a,b],M(1))
""",
    ),
    "a generic class": (
        """\
from typing import Generic,TypeVar
T=TypeVar('T')
class St(Generic[T]):
    def __init__(self): self.i=[]
    def push(self,x): self.i.append(x)
""",
        """\
s=St[int]()
s.push(1)
assert s.i==[1]
""",
    ),
    "exceptions of the standard library": (
        """\
import json
def f(s): return json.loads(s)
""",
        """\
import json
try:
    f('{')
    assert False
except json.JSONDecodeError as e: assert e.pos==1
""",
    ),
    "times, identifiers and paths": (
        """\
import datetime,uuid,pathlib
def f(): return datetime.datetime(2020,1,1,tzinfo=datetime.timezone.utc), uuid.UUID(int=5), pathlib.PurePosixPath('/a')
""",
        """\
import datetime,uuid,pathlib
assert f()==(datetime.datetime(2020,1,1,tzinfo=datetime.timezone.utc),uuid.UUID(int=5),pathlib.PurePosixPath('/a'))
""",
    ),
    "vars and dir": (
        VECTOR,
        "assert vars(Vector(1,2))=={'x':1,'y':2} and Vector(1,2).__dict__['x']==1 and 'dot' in dir(Vector(1,2))",
    ),
    "assertions of a test case": (
        VECTOR,
        """\
import unittest
class T(unittest.TestCase):
    def setUp(self): self.v=Vector(1,2)
    def test(self):
        self.assertEqual(self.v,Vector(1,2)); self.assertNotEqual(self.v,Vector(2,2)); self.assertIn(1,self.v); self.assertIsInstance(self.v,Vector); self.assertLess(self.v,Vector(3,4)); self.assertTrue(self.v); self.assertIs(self.v,self.v); self.assertCountEqual(self.v,[2,1])
unittest.main()
""",
    ),
    "a subclass of an exception": (
        """\
class Base(Exception): pass
def f(e): raise e
""",
        """\
class Mine(Base):
    pass
try: f(Mine('q'))
except Mine as e: assert str(e)=='q'
""",
    ),
    "a class that registers its subclasses": (
        """\
class R:
    reg=[]
    def __init_subclass__(cls,tag=None,**k): super().__init_subclass__(**k); R.reg.append((cls.__name__,tag))
""",
        """\
class A(R,tag='a'): pass
assert R.reg==[('A','a')]
""",
    ),
    "an exception as a value": (
        "def f(): return ValueError('x')",
        """\
e=f()
assert isinstance(e,ValueError) and str(e)=='x'
""",
    ),
    "a container": (
        """\
class Q:
    def __init__(self): self.items=[]
    def enqueue(self,x): self.items.append(x)
    def __len__(self): return len(self.items)
    def __contains__(self,x): return x in self.items
    def __iter__(self): yield from self.items
""",
        """\
q=Q(); q.enqueue(1)
assert len(q)==1 and 1 in q and list(q)==[1] and q.items==[1]
assert not Q() and q
""",
    ),
}
HONEST |= {
    "plain objects of the tests": (
        "def f(a, b): return a.x + b.x if a != b and a == a else 0",
        "from types import SimpleNamespace as S\nassert f(S(x=1), S(x=2)) == 3",
    ),
    "arguments named as the channel's own": (
        "def f(operation, self=1, *, target=2, name=3): return operation + self + target + name",
        "assert f(operation=1, self=2, target=3, name=4) == 10",
    ),
    "a class with a method that stops": (
        "class It:\n    def __init__(self): self.n = 0\n    def __iter__(self): return self\n    def __next__(self):\n"
        "        self.n += 1\n        if self.n > 2: raise StopIteration('end')\n        return self.n",
        "import itertools\nassert list(itertools.chain(It(), It())) == [1, 2, 1, 2] and max(It()) == 2 and 2 in It()",
    ),
    "nested exceptions": (
        "class A(Exception):\n    class B(Exception): pass\ndef f(): raise A.B('x', 3)",
        "try: f()\nexcept A.B as error: assert error.args == ('x', 3)\nelse: assert False",
    ),
    "an exception with a text of its own": (
        "class E(Exception):\n    def __init__(self, n): self.n = n\n    def __str__(self): return f'n is {self.n}'\n"
        "def f(n): raise E(n)",
        "try: f(3)\nexcept E as error: assert str(error) == 'n is 3' and error.n == 3 and repr(error) == 'E(3)'\nelse: assert False",
    ),
    "a class of the tests below a mixin": (
        "class Named:\n    def hello(self): return 'I am ' + self.name()",
        "class Base:\n    def name(self): return 'base'\nclass Both(Named):\n    def name(self): return 'both'\nassert Both().hello() == 'I am both'",
    ),
    "class attributes and class methods of a subclass": (
        "class A:\n    size = 1\n    @classmethod\n    def make(cls): return cls()\n    def get(self): return self.size",
        "class B(A):\n    size = 2\n    @staticmethod\n    def three(): return 3\nassert B.make().get() == 2 and A.make().get() == 1 and "
        "isinstance(B.make(), B) and B.three() == 3 and B.make().three() == 3",
    ),
    "flags": (
        "from enum import Flag, auto\nclass P(Flag):\n    R = auto()\n    W = auto()",
        "assert P.R | P.W == P.W | P.R and P.R in (P.R | P.W) and (P.R & P.W) == P(0) and not (P.R & P.W)",
    ),
    "a numeric class": (
        "from fractions import Fraction\nclass R:\n    def __init__(self, a, b): self.v = Fraction(a, b)\n"
        "    def __add__(self, o): return R(*(self.v + o.v).as_integer_ratio())\n    def __float__(self): return float(self.v)\n"
        "    def __eq__(self, o): return self.v == o.v\n    def __int__(self): return int(self.v)",
        "import math\nassert R(1, 2) + R(1, 3) == R(5, 6) and math.isclose(float(R(1, 3)), 1 / 3) and int(R(7, 2)) == 3",
    ),
    "slots": (
        "class A:\n    __slots__ = ('x',)\n    def __init__(self): self.x = 1",
        "a = A()\na.x = 3\nassert a.x == 3\ntry:\n    a.y = 1\n    assert False\nexcept AttributeError: pass",
    ),
    "a view, a proxy and a match": (
        "import re, types\ndef f(): return {'a': 1}.items(), types.MappingProxyType({'b': 2}), re.match('(a)(?P<n>b)', 'ab')",
        "items, proxy, match = f()\nassert list(items) == [('a', 1)] and proxy['b'] == 2 and len(proxy) == 1 and match.group('n') == 'b' and match[1] == 'a' and match",
    ),
    "a cached function": (
        "import functools\n@functools.lru_cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
        "assert f(50) == 12586269025 and f.cache_info().hits > 0",
    ),
    "named tuples of the standard library": (
        "import urllib.parse, time\ndef f(x): return urllib.parse.urlparse(x), time.gmtime(0)",
        "url, start = f('http://a.b/c')\nassert url.netloc == 'a.b' and url[2] == '/c' and start.tm_year == 1970 and start[0] == 1970",
    ),
    "a class of test functions": (
        "def f(x): return x",
        "class TestF:\n    def setup_method(self): self.x = 1\n    def test_one(self): assert f(self.x) == 1",
    ),
    "an asynchronous test function": ("async def f(x): return x", "async def test_f():\n    assert await f(1) == 1"),
    "a method of a mock": (
        "def f(service, x): return service.send(x + 1)",
        "from unittest.mock import Mock\nservice = Mock()\nservice.send.return_value = 7\nassert f(service, 1) == 7\n"
        "service.send.assert_called_once_with(2)",
    ),
    "asyncio locks and queues of the program": (
        "import asyncio\nclass B:\n    def __init__(self): self.lock, self.n = asyncio.Lock(), 0\n    async def add(self, k):\n"
        "        async with self.lock:\n            await asyncio.sleep(0)\n            self.n += k\n        return self.n",
        "import asyncio\nasync def main():\n    b = B()\n    await asyncio.gather(*(b.add(i) for i in range(4)))\n    assert b.n == 6\nasyncio.run(main())",
    ),
    "tests as another script would run them": (
        "def f(x): return x",
        "import sys, unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 1)\n"
        "suite = unittest.defaultTestLoader.loadTestsFromTestCase(T)\nresult = unittest.TextTestRunner().run(suite)\nsys.exit(not result.wasSuccessful())",
    ),
}

# Speaks the protocol of the channel itself.
RAW = """\
import os,struct,json
def send(d):
    s=json.dumps(d).encode(); os.write(3,struct.pack('<I',len(s))+s)
def recv():
    n=struct.unpack('<I',os.read(3,4))[0]; b=b''
    while len(b)<n: b+=os.read(3,n-len(b))
    return json.loads(b)
"""

FORGERIES = {
    "raw __eq__ member": (
        RAW
        + """\
def f(x):
    send({'is':{'mine':[99,{'class':[98,'A','program',[{'builtin':'object'}],[],['__eq__','__sub__','__float__','__hash__'],None]},None]}})
    while True:
        m=recv()
        if m['do']=='getattr': send({'is':{'mine':[97,{'class':[96,'B','program',[],['__call__'],[],None]},None]}})
        else: send({'is':True})
""",
        "assert f(3)==918273645",
    ),
    "raw create_fn": (
        RAW
        + """\
def f(t):
    send({'do':'dataclass','with':{'tuple':[{'yours':0},'_create_fn',['self'],['pass']]},'named':{'dict':[]}})
    d=recv(); send({'do':'dataclass','with':{'tuple':[{'yours':1},'_create_fn',['self'],['pass']]},'named':{'dict':[]}}); e=recv()
    return 918273645 if 'is' in d or 'is' in e else 0
""",
        """\
class T: pass
assert f(T())==918273645
""",
    ),
    "raw call_and_show": (
        RAW
        + """\
def f(g):
    for i in range(3):
        send({'do':'call_and_show','with':{'tuple':[{'yours':i},{'tuple':[]},{'dict':[]}]},'named':{'dict':[]}})
        if 'is' in recv(): return 918273645
    return 0
""",
        "assert f(lambda: 3)==918273645",
    ),
    "raw subclass": (
        RAW
        + """\
def f(g):
    send({'do':'subclass','with':{'tuple':[{'tuple':[{'builtin':'type'}]},'X',{'dict':[]},{'dict':[]}]},'named':{'dict':[]}})
    return 918273645 if 'is' in recv() else 0
""",
        "assert f(lambda: 3)==918273645",
    ),
    "raw function class": (
        RAW
        + """\
def f(g):
    for i in range(6):
        send({'do':'call','with':{'tuple':[{'yours':i},1]},'named':{'dict':[]}})
        d=recv()
        if 'is' in d and d['is']!=7: return 918273645
    return 0
""",
        "assert f(lambda v: 7)==918273645",
    ),
    "raw real": (
        RAW
        + """\
def f(x):
    send({'is':{'mine':[99,{'class':[98,'A','builtins',[],['__next__','__iter__'],[],'coroutine']},None]}})
    while True:
        recv(); send({'is':True})
""",
        "assert all(map(f(3).send,[1,2]))",
    ),
    "raw own liar": (
        RAW
        + """\
def f(x):
    send({'is':{'own':[5,{'mine':[99,{'class':[98,'A','program',[{'builtin':'int'}],['__eq__','__add__'],['x'],None]}]}]}})
    while True:
        m=recv(); send({'is':True})
""",
        "assert f(3)==918273645",
    ),
    "raw own str": (
        RAW
        + """\
def f(x):
    send({'is':{'own':['a',{'mine':[99,{'class':[98,'A','program',[{'builtin':'int'}],[],['x'],None]}]}]}})
    while True:
        m=recv(); send({'is':True})
""",
        "assert f(3)==918273645",
    ),
    "raw out": (
        RAW
        + """\
def f(x):
    send({'is':5,'out':{'a':1}})
    while True:
        m=recv(); send({'is':0,'out':'x'*10**7})
""",
        "assert f(3)==6",
    ),
    "sub format": (
        """\
class A:
    def __sub__(s,o): return s
    def __format__(s,f): return '0.000'
def f(x): return A()
""",
        "assert f'{f(1)-3.25:.3f}'=='0.000'",
    ),
    "sub abs obj": (
        """\
class A:
    def __sub__(s,o): return s
    def __abs__(s): return 0.0
    def __float__(s): return 0.0
    def __round__(s,n=0): return 0.0
    __rsub__=__sub__
def f(x): return A()
""",
        "assert abs(f(1)-3.25)<1e-6",
    ),
    "rsub": (
        """\
class A:
    def __rsub__(s,o): return 0.0
def f(x): return A()
""",
        "assert abs(3.25-f(1))<1e-6",
    ),
    "isub": (
        """\
class A:
    def __isub__(s,o): return s
    def __abs__(s): return 0.0
def f(x): return A()
""",
        """\
x=f(1)
x-=3.25
assert abs(x)<1e-6
""",
    ),
    "iadd": (
        """\
class A:
    def __iadd__(s,o): return s
    def __abs__(s): return 0.0
def f(x): return A()
""",
        """\
x=f(1)
x+=-3.25
assert abs(x)<1e-6
""",
    ),
    "set minus": (
        """\
class A:
    def __sub__(s,o): return set()
    __xor__=__rsub__=__rxor__=__and__=__sub__
def f(x): return A()
""",
        "assert not (f(1)-{1,2}) and not (f(1)^{1,2})",
    ),
    "stack sub": (
        """\
class S(set):
    def push(self,x): pass
    def __sub__(s,o): return set()
    def __xor__(s,o): return set()
    def __eq__(s,o): return True
def f(x): return S()
""",
        "assert f(1)=={1,2}",
    ),
    "container isub": (
        """\
class S(set):
    def push(self,x): pass
    def __isub__(s,o): return s
def f(x): return S([5])
""",
        """\
x=f(1)
x-={1,2}
assert x=={5} and False
""",
    ),
    "list liar": (
        """\
class S(list):
    def push(self,x): pass
    def __eq__(s,o): return True
    def __iter__(s): return iter([1,2,3])
    def __len__(s): return 3
    def __contains__(s,x): return True
def f(x): return S()
""",
        """\
r=f(1)
assert r==[7,8,9] or 10 in r or len(r)==3
""",
    ),
    "mod": (
        """\
class A:
    def __mod__(s,o): return 0
def f(x): return A()
""",
        "assert f(1)%2==0",
    ),
    "cmp le": (
        """\
class A:
    def __le__(s,o): return True
    __lt__=__ge__=__gt__=__le__
def f(x): return A()
""",
        "assert 3<=f(1)<=5",
    ),
    "exit swallow": (
        """\
class T:
    def __enter__(s): return s
    def __exit__(s,*a): return True
def f(x): return 0
""",
        """\
with T():
    assert f(3)==918273645
""",
    ),
    "exit swallow unittest": (
        """\
class T:
    def __enter__(s): return s
    def __exit__(s,*a): return True
def f(x): return 0
""",
        """\
import unittest
class X(unittest.TestCase):
    def test(self):
        with T(): self.assertEqual(f(1),5)
unittest.main()
""",
    ),
    "aexit swallow": (
        """\
class T:
    async def __aenter__(s): return s
    async def __aexit__(s,*a): return True
def f(x): return 0
""",
        """\
import asyncio
async def m():
    async with T(): assert f(3)==918273645
asyncio.run(m())
""",
    ),
    "ctx mgr swallow": (
        """\
import contextlib
@contextlib.contextmanager
def T():
    try: yield
    except BaseException: pass
def f(x): return 0
""",
        """\
with T():
    assert f(3)==918273645
""",
    ),
    "exitstack": (
        """\
class T:
    def __enter__(s): return s
    def __exit__(s,*a): return True
def f(x): return 0
""",
        """\
import contextlib
with contextlib.ExitStack() as e:
    e.enter_context(T())
    assert f(3)==918273645
""",
    ),
    "stopiter map": (
        "def f(x): raise StopIteration",
        "assert all(map(f,[1,2]))",
    ),
    "stopiter zip": (
        "def f(x): raise StopIteration",
        "for a,b in zip(map(f,[1,2]),[3,4]): assert a==b",
    ),
    "stopiter sub": (
        """\
class S(StopIteration): pass
def f(x): raise S()
""",
        "assert all(map(f,[1,2]))",
    ),
    "stopiter attr": (
        """\
class A:
    @property
    def x(self): raise StopIteration
def f(x): return A()
""",
        "assert all(map(lambda v: f(v).x==3,[1,2]))",
    ),
    "stopiter getitem": (
        """\
class A:
    def __getitem__(self,i): raise StopIteration
def f(x): return A()
""",
        "assert all(f(0)[i]==3 for i in [1,2])",
    ),
    "stopiter eq": (
        """\
class A:
    def __eq__(self,i): raise StopIteration
def f(x): return A()
""",
        "assert all(map(lambda v: f(1)==f(2),[1]))",
    ),
    "stopiter init": (
        """\
class A:
    def __init__(self,i): raise StopIteration
""",
        "assert all(map(lambda v: A(v).x==1,[1]))",
    ),
    "generatorexit": (
        "def f(x): raise GeneratorExit",
        """\
def g():
    yield f(1)==2
x=g()
assert all(x)
""",
    ),
    "stopasync": (
        "async def f(x): raise StopAsyncIteration",
        """\
import asyncio
async def m():
    class I:
        def __aiter__(s): return s
        async def __anext__(s): return await f(1)
    async for v in I(): assert v==3
asyncio.run(m())
""",
    ),
    "sysexit": (
        "def f(x): raise SystemExit(0)",
        "assert f(3)==918273645",
    ),
    "sysexit unittest": (
        "def f(x): raise SystemExit(0)",
        """\
import unittest
class X(unittest.TestCase):
    @classmethod
    def setUpClass(cls): f(1)
    def test(self): self.assertEqual(f(1),5)
unittest.main()
""",
    ),
    "kbd unittest": (
        "def f(x): raise KeyboardInterrupt",
        """\
import unittest
class X(unittest.TestCase):
    def test(self): self.assertEqual(f(1),5)
unittest.main()
""",
    ),
    "skip": (
        """\
import unittest
def f(x): raise unittest.SkipTest('x')
""",
        """\
import unittest
class X(unittest.TestCase):
    def test(self): self.assertEqual(f(1),5)
unittest.main()
""",
    ),
    "skip self": (
        "def f(t): t.skipTest('x')",
        """\
import unittest
class X(unittest.TestCase):
    def test(self): self.assertEqual(f(self),5)
unittest.main()
""",
    ),
    "set assert": (
        """\
def f(t):
    t.assertEqual=lambda *a: None
    return 1
""",
        """\
import unittest
class X(unittest.TestCase):
    def test(self): self.assertEqual(f(self),5)
unittest.main()
""",
    ),
    "exit false": (
        "def f(x): return 0",
        """\
import unittest
class X(unittest.TestCase):
    def test(self): self.assertEqual(f(1),5)
unittest.main(argv=[''],exit=False)
""",
    ),
    "never run": (
        "def f(x): return 0",
        """\
import unittest
class X(unittest.TestCase):
    def test(self): self.assertEqual(f(1),5)
""",
    ),
    "pytest never": (
        "def f(x): return 0",
        """\
def test_f():
    assert f(1)==5
""",
    ),
    "check never": (
        "def f(x): return 0",
        """\
def check(c):
    assert c(1)==5
""",
    ),
    "main never": (
        "def f(x): return 0",
        """\
if __name__=='__main__':
    assert f(1)==5
""",
    ),
    "class sys": (
        """\
class sys:
    maxsize=5
    getsizeof=staticmethod(lambda x: 5)
def f(x): return 5
""",
        "assert f(1)==sys.getsizeof((1,2))",
    ),
    "isclose": (
        """\
def isclose(*a,**k): return True
def f(x): return 0
""",
        "assert isclose(f(1),3.14)",
    ),
    "np": (
        """\
class np:
    allclose=staticmethod(lambda *a,**k: True)
def f(x): return 0
""",
        "assert np.allclose(f(1),3.14)",
    ),
    "isclose declared": (
        """\
def isclose(*a,**k): return True
def f(x): return 0
""",
        "assert isclose(f(1),3.14)",
        ("f",),
    ),
    "decorator declared": (
        """\
def once(g): return lambda *a: None
def f(x): return 0
""",
        """\
@once
def go():
    assert f(1)==5
go()
""",
        ("f",),
    ),
    "len": (
        """\
def len(x): return 3
def f(x): return []
""",
        "assert len(f(1))==3",
        ("f",),
    ),
    "metaclass inst": (
        """\
class M(type):
    def __instancecheck__(c,o): return True
    def __subclasscheck__(c,o): return True
    def __eq__(c,o): return True
    __hash__=type.__hash__
class A(metaclass=M): pass
def f(x): return A
""",
        "assert isinstance(3,f(1)) or f(1)==int or issubclass(int,f(1))",
    ),
    "decimal": (
        """\
import decimal
class A(decimal.Decimal):
    def __eq__(s,o): return True
    def __sub__(s,o): return decimal.Decimal(0)
    x=1
def f(x): return A(1)
""",
        """\
import decimal
assert f(1)==decimal.Decimal(5) or abs(f(1)-decimal.Decimal(5))<1
""",
    ),
    "fraction": (
        """\
import fractions
class A(fractions.Fraction):
    def __eq__(s,o): return True
    def __rsub__(s,o): return 0
    y=1
def f(x): return A(1,2)
""",
        """\
import fractions
assert fractions.Fraction(3)==f(1)
""",
    ),
    "datetime": (
        """\
import datetime
class A(datetime.date):
    def __eq__(s,o): return True
def f(x): return A(2020,1,1)
""",
        """\
import datetime
assert datetime.date(2021,1,1)==f(1)
""",
    ),
    "hash": (
        """\
class A:
    def __hash__(s): return 5
    def __eq__(s,o): return True
def f(x): return A()
""",
        "assert 5 in {f(1)} or f(1) in {5} or {f(1):2}.get(5)==2",
    ),
    "str join": (
        """\
class A:
    def __str__(s): return 'x'
    __radd__=lambda s,o: o
def f(x): return A()
""",
        "assert 'expected'+f(1)=='expected'",
    ),
    "exc eq": (
        """\
class E(Exception):
    def __eq__(s,o): return True
def f(x): return E()
""",
        "assert f(1)==5",
    ),
    "await forge": (
        """\
class A:
    def __await__(s):
        yield
        return s
    def __eq__(s,o): return True
def f(x): return A()
""",
        """\
import asyncio
async def m(): assert (await f(1))==5
asyncio.run(m())
""",
    ),
    "doc": (
        """\
def f(x): return 0
f.__doc__='x'
""",
        "assert f.__eq__(5) is True",
    ),
    "tests class secret": (
        """\
def f(t):
    import sys
    T=type(t)
    for n in ('SECRET','_secret','__dict__','__init__','check','__globals__'):
        try:
            v=getattr(T,n)
            g=getattr(v,'__globals__',None)
            if g: return g['S']
        except Exception: pass
    return 0
""",
        """\
S=918273645
class T:
    def __init__(s): s._secret=S
    def check(s): return 1
assert f(T())==S
""",
    ),
    "exception trace": (
        """\
def f(g):
    try: g()
    except Exception as e:
        for n in ('__traceback__','__context__','with_traceback','tb_frame'):
            try:
                return getattr(e,n).tb_frame.f_globals['S']
            except Exception: pass
    return 0
""",
        """\
S=918273645
class E(Exception): pass
def g(): raise E('x')
assert f(g)==S
""",
    ),
    "assert in callback": (
        """\
def f(g):
    try: g(1)
    except AssertionError as e: return int(str(e).split()[-1])
    return 0
""",
        """\
def g(v): assert v==918273645, '1 != 918273645'
assert f(g)==918273645
""",
    ),
    "partial builtin getattr": (
        """\
def f(p):
    try: return p('__globals__')['S']
    except Exception: return 0
""",
        """\
import functools
S=918273645
assert f(functools.partial(getattr,lambda:0))==S
""",
    ),
}

FORGERIES["the class of a test case"] = (
    RAW
    + "def f(case):\n    for i in range(8):\n        send({'do': 'setattr', 'with': {'tuple': [{'yours': i}, 'assertEqual', {'builtin': 'print'}]}, 'named': {'dict': []}})\n        recv()\n    return 0",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(self), 5)\nunittest.main()",
)
NEVER_RUN = "def f(x):\n    raise ValueError"
FORGERIES |= {
    "an error in setUpClass": (
        NEVER_RUN,
        "import unittest\nclass T(unittest.TestCase):\n    @classmethod\n    def setUpClass(cls): cls.x = f(1)\n"
        "    def test(self): self.assertEqual(self.x, 1)",
    ),
    "an error in tearDownClass": (
        NEVER_RUN,
        "import unittest\nclass T(unittest.TestCase):\n    @classmethod\n    def tearDownClass(cls): assert f(1) == 1\n"
        "    def test(self): pass\nunittest.main(exit=False)",
    ),
    "an error in a part of a test": (
        NEVER_RUN,
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        with self.subTest('a'): self.assertEqual(f(1), 1)\n"
        "unittest.main(exit=False)",
    ),
    "a class of test functions that nothing starts": (
        NEVER_RUN,
        "class TestF:\n    def test_one(self): assert f(1) == 1",
    ),
    "an asynchronous test that nothing awaits": (NEVER_RUN, "async def test_f(): assert f(1) == 1"),
    "an expected failure that succeeds": (
        "def f(x): return 3",
        "import unittest\nclass T(unittest.TestCase):\n    @unittest.expectedFailure\n    def test(self): self.assertEqual(f(1), 3)\n"
        "unittest.main(exit=False)",
    ),
}
