"""
How one process of the sandbox sees what lives in the other: an object as a [`Remote`], a class as a local class whose
calls, attributes and special methods are asked for over the channel. So `isinstance`, `except`, `with`, `in`, operators
and a class statement below a class of the other side's work as they do in one process.

The tests are guarded: what they compare with never reaches the program. Where an operation would have to send it, and
the program's answer would decide the verdict, the operation is [`Unsupported`].

Imports the standard library only, as it runs in an interpreter that has nothing else.
"""

import collections
import operator
import types


class Lost(BaseException):
    """The other side is gone or talks nonsense. No `except Exception` of a test may swallow it."""


class Unsupported(BaseException):
    """The tests do something that has no safe answer. That is no fault of the program."""


def is_remote(thing) -> bool:
    return isinstance(type(thing), RemoteClass) or type(thing) is RemoteClass


def plain_name(kind: type) -> str:
    return type.__getattribute__(kind, "__name__")


class RemoteClass(type):
    """Class of the local stand-ins for the other side's classes."""

    def __new__(meta, name, bases, namespace, **named):
        kind = super().__new__(meta, name, bases, namespace)
        if "_trl_id" not in namespace:  # a class statement, below a class of the other side's
            peer = kind._trl_peer
            own = {key: _member(value) for key, value in namespace.items() if key not in _NOT_MEMBERS}
            index = peer.ask("subclass", bases, name, own, named)
            type.__setattr__(kind, "_trl_id", index)
            type.__setattr__(kind, "_trl_here", True)
            peer.classes[index] = kind
        return kind

    def __init__(cls, name, bases, namespace, **named):
        super().__init__(name, bases, namespace)

    def __call__(cls, /, *arguments, **named):
        return cls._trl_peer.call(cls, arguments, named)

    def __getattr__(cls, name):
        if cls._trl_peer is None:
            raise AttributeError(name)
        return cls._trl_peer.ask("getattr", cls, name)

    def __setattr__(cls, name, value):
        cls._trl_peer.ask("setattr", cls, name, value)

    def __delattr__(cls, name):
        cls._trl_peer.ask("delattr", cls, name)

    def __getitem__(cls, key):
        return cls._trl_peer.ask("getitem", cls, key)

    def __iter__(cls):
        return cls._trl_peer.ask("iter", cls)

    def __len__(cls):
        return cls._trl_peer.ask("len", cls)

    def __bool__(cls):
        return True

    def __contains__(cls, item):
        return cls._trl_peer.ask("contains", cls, item) if is_remote(item) else any(each == item for each in cls)

    def __instancecheck__(cls, instance):
        if type.__instancecheck__(cls, instance):
            return True
        if cls._trl_peer is not None and is_remote(instance):
            return bool(cls._trl_peer.ask("isinstance", cls, instance))
        if cls._trl_peer is not None:
            cls._trl_peer.doubt(f"`isinstance` of plain data and `{plain_name(cls)}`: it crosses without its class")
        return False

    def __subclasscheck__(cls, other):
        if type.__subclasscheck__(cls, other):
            return True
        return cls._trl_peer is not None and is_remote(other) and bool(cls._trl_peer.ask("issubclass", cls, other))


class Attribute:
    """An attribute of a class of the other side's, found there: for `super()`, and for what every local class has too."""

    def __init__(self, name: str):
        self.name = name
        self.owner = None

    def __set_name__(self, owner, name):
        self.owner = owner

    def __get__(self, instance, owner):
        peer = owner._trl_peer
        if peer is None:
            return None
        if instance is None:
            return peer.ask("getattr", owner, self.name)
        if type(instance).__dict__.get("_trl_here") and self.owner._trl_peer:
            return peer.ask("member", self.owner, instance, self.name)
        return peer.ask("getattr", instance, self.name)


class Remote(metaclass=RemoteClass):
    _trl_id = _trl_peer = None
    _trl_tainted = False  # made by an operator from a value of the tests'

    def _trl_ask(self, operation, *arguments):
        return self._trl_peer.ask(operation, self, *arguments)

    def __getattr__(self, name):
        if name.startswith("_trl_"):
            raise AttributeError(name)
        return self._trl_ask("getattr", name)

    def __setattr__(self, name, value):
        self._trl_ask("setattr", name, value)

    def __delattr__(self, name):
        self._trl_ask("delattr", name)

    def __dir__(self):
        return self._trl_ask("dir")

    def __copy__(self):
        return self._trl_ask("copy")

    def __deepcopy__(self, memo):
        return self._trl_ask("deepcopy")

    def __reduce_ex__(self, protocol):
        self._trl_peer.refuse("to pickle an object of the program")

    def __str__(self):
        return self._trl_ask("str")

    def __repr__(self):
        return self._trl_ask("repr")

    __dict__ = property(lambda self: self._trl_ask("getattr", "__dict__"))


type.__setattr__(Remote, "__doc__", Attribute("__doc__"))


def taint(thing):
    object.__setattr__(thing, "_trl_tainted", True)
    return thing


def _asked(operation):
    def method(self, *arguments):
        return self._trl_ask(operation, *arguments)

    return method


def _number(operation):
    """Of what an operator made from a value of the tests', a number could only be the program's word on that value."""

    def method(self, *arguments):
        if self._trl_tainted:
            self._trl_peer.refuse(
                f"`{operation}` of what an operator made from an object of the program and a test's value"
            )
        return self._trl_ask(operation, *arguments)

    return method


def _unary(operation):
    def method(self):
        result = self._trl_ask(operation)
        return _checked(self, operation, result) if self._trl_tainted else result

    return method


def _binary(operation):
    def method(self, other):
        peer = self._trl_peer
        tainted = self._trl_tainted or getattr(other, "_trl_tainted", False)
        if not peer.guards or (is_remote(other) and not tainted):
            return self._trl_ask(operation, other)
        if operation.removeprefix("r").removeprefix("i") in ("sub", "xor", "and") and isinstance(other, _COLLECTIONS):
            peer.refuse(f"the operator `{operation}` between an object of the program and a collection of the test's")
        result = self._trl_ask(operation, other)
        if result is self and not tainted and isinstance(other, _COLLECTIONS):  # `stack += [1, 2]`
            return self
        return _checked(self, operation, result)

    return method


def _checked(self, operation, result):
    if isinstance(result, Remote) and not isinstance(result, (*VALUES, Container)):
        return taint(result)
    self._trl_peer.refuse(
        f"the operator `{operation}` between an object of the program and a test's value, where it gives plain data"
    )


def _format(self, form):
    if form and self._trl_tainted:
        self._trl_peer.refuse("to format what an operator made from an object of the program and a test's value")
    return self._trl_ask("format", form)


def _equal(operation):
    def method(self, other):
        if is_remote(other) or not self._trl_peer.guards:
            return bool(self._trl_ask(operation, other))
        if other is not None:
            self._trl_peer.doubt(
                f"`==` between `{plain_name(type(self))}`, which defines it, and a test's value is always False"
            )
        return NotImplemented

    return method


def _ordered(operation):
    def method(self, other):
        if not is_remote(other) and self._trl_peer.guards:
            self._trl_peer.refuse(f"an ordering (`{operation}`) between an object of the program and a test's value")
        return self._trl_ask(operation, other)

    return method


def _contains(self, item):
    if is_remote(item) or not self._trl_peer.guards:
        return bool(self._trl_ask("contains", item))
    if not any({"__iter__", "__getitem__"} & vars(base).keys() for base in type(self).__mro__):
        self._trl_peer.refuse("`in` an object of the program that cannot be iterated over")
    self._trl_peer.doubt(f"`in` goes through the items of `{plain_name(type(self))}`: its `__contains__` is not asked")
    return any(each is item or each == item for each in self)


def _exit(self, kind, error, trace):
    if isinstance(error, Lost | Unsupported):
        return False
    if isinstance(error, AssertionError) and not is_remote(error) and self._trl_peer.guards:
        self._trl_ask("exit", AssertionError, AssertionError(), None)
        return False  # a test's own failure: no program decides what becomes of it
    return self._trl_ask("exit", kind, error, None)


def _await(self):
    return self._trl_ask("await")
    yield


def _send(self, value):
    if value is not None:
        self._trl_peer.refuse("to send a value into a coroutine of the program")
    raise StopIteration(self._trl_ask("await"))


def _throw(self, kind, *arguments):
    raise kind


async def _anext(self):
    return self._trl_ask("anext")


async def _aenter(self):
    return self._trl_ask("aenter")


async def _aexit(self, kind, error, trace):
    if isinstance(error, AssertionError) and not is_remote(error) and self._trl_peer.guards:
        self._trl_ask("aexit", AssertionError, AssertionError(), None)
        return False
    return self._trl_ask("aexit", kind, error, None)


_ARITHMETIC = "add sub mul matmul truediv floordiv mod pow lshift rshift and xor or".split()
SPECIAL = {f"__{name}__": _asked(name) for name in "next iter reversed hash str repr bytes fspath getitem setitem delitem aiter enter copy deepcopy length_hint".split()}  # fmt: skip
SPECIAL |= {f"__{name}__": _number(name) for name in "len bool int float complex index abs round trunc floor ceil".split()}  # fmt: skip
SPECIAL |= {f"__{name}__": _unary(name) for name in "neg pos invert".split()}
for _name in _ARITHMETIC:
    SPECIAL |= {f"__{prefix}{_name}__": _binary(f"{prefix}{_name}") for prefix in ("", "r", "i")}
SPECIAL |= {"__divmod__": _binary("divmod"), "__rdivmod__": _binary("rdivmod")}
SPECIAL |= {f"__{name}__": _ordered(name) for name in ("lt", "le", "gt", "ge")}
SPECIAL |= {
    "__eq__": _equal("eq"),
    "__ne__": _equal("ne"),
    "__contains__": _contains,
    "__exit__": _exit,
    "__format__": _format,
}
SPECIAL |= {"__await__": _await, "__anext__": _anext, "__aenter__": _aenter, "__aexit__": _aexit}
SPECIAL["__call__"] = lambda self, /, *arguments, **named: self._trl_peer.call(self, arguments, named)
OF_COROUTINES = {"send": _send, "throw": _throw, "close": lambda self: None}
OF_GENERATORS = {"send": _asked("send")}


type.__setattr__(Remote, "__format__", _format)


class Container(Remote):
    """An object of a program's own subclass of list, dict, set, ..: its methods are its own, its items the base's."""

    _trl_id = None

    def __eq__(self, other):
        return items(self) == items(other)

    def __ne__(self, other):
        return items(self) != items(other)

    __hash__ = None

    def __len__(self):
        return len(items(self))

    def __bool__(self):
        return bool(items(self))

    def __iter__(self):
        return iter(items(self))

    def __reversed__(self):
        return reversed(items(self))

    def __contains__(self, item):
        return item in items(self)

    @property
    def __class__(self):  # what `isinstance` looks at last
        self._trl_peer.doubt(
            f"`isinstance` of `{plain_name(type(self))}` and the builtin class that it is derived from is False"
        )
        return type(self)


def items(thing):
    return thing._trl_ask("items") if isinstance(thing, Container) else thing


def _on_items(operation, reflected):
    def method(self, other):
        mine, others = items(self), items(other)
        return operation(others, mine) if reflected else operation(mine, others)

    return method


for _name in ("add", "sub", "mul", "and", "xor", "or"):
    for _prefix in ("", "r"):
        _operation = getattr(operator, {"and": "and_", "or": "or_"}.get(_name, _name))
        type.__setattr__(Container, f"__{_prefix}{_name}__", _on_items(_operation, _prefix == "r"))
ASKED_OF_CONTAINERS = {"__getitem__", "__setitem__", "__delitem__", "__iadd__", "__imul__", "__ior__"}
for _name in ASKED_OF_CONTAINERS:
    type.__setattr__(Container, _name, SPECIAL[_name])
for _name in ("lt", "le", "gt", "ge"):
    type.__setattr__(Container, f"__{_name}__", _on_items(getattr(operator, _name), False))
OF_CONTAINERS = {name for name in vars(Container) if name in SPECIAL}

CONTAINERS = (list, dict, set, bytearray, collections.deque)
_COLLECTIONS = (*CONTAINERS, tuple, frozenset, str, bytes, range)
VALUES = (int, float, str, bytes, tuple, complex, frozenset)  # a local stand-in of a subclass of these is the value
# Builtin classes without a name in `builtins`, which an object is an instance of as long as `isinstance` is asked.
REAL = {
    kind.__name__: kind
    for kind in (*[value for value in vars(types).values() if isinstance(value, type)], map, zip, filter, enumerate, reversed)
    if kind.__module__ in ("builtins", "types")
}  # fmt: skip
_NOT_MEMBERS = {"__module__", "__qualname__", "__classcell__", "__dict__", "__weakref__"}


def special_names(kind: type) -> list[str]:
    """What a class defines itself of the special methods; "-" before one that it takes away."""
    return [("-" if value is None else "") + name for name, value in vars(kind).items() if name in SPECIAL]


def make_class(peer, index: int, name: str, module: str, bases: list, specials: list, members: list, real: str | None):
    """The local class for a class of the other side's, from what came over the channel."""
    is_value = any(issubclass(base, VALUES) for base in bases)
    is_container = any(issubclass(base, Container) for base in bases)
    # No special method among them: it would be sent what it is compared with.
    namespace = {
        member: Attribute(member)
        for member in members
        if member == "__init__" or not (member.startswith("_trl_") or member.endswith("__"))
    }
    for special in specials:
        special, taken_away = special.removeprefix("-"), special.startswith("-")
        if is_value and special not in ("__str__", "__repr__", "__format__", "__call__", "__enter__", "__exit__"):
            if members and special not in ("__hash__", "__reduce_ex__"):
                namespace.setdefault("_trl_ignored", special)
            continue
        if is_container and special in OF_CONTAINERS - ASKED_OF_CONTAINERS:
            if members and not taken_away:
                namespace.setdefault("_trl_ignored", special)
            continue
        namespace[special] = None if taken_away else SPECIAL[special]
    if real in REAL:
        namespace["__class__"] = property(lambda self: REAL[real])
        namespace.update(OF_COROUTINES if real == "coroutine" else OF_GENERATORS if real == "generator" else {})
    namespace |= {"_trl_id": index, "_trl_peer": peer, "__module__": str(module), "__doc__": Attribute("__doc__")}
    bases = [base for base in bases if base is not object]
    if not any(issubclass(base, Remote) for base in bases):
        bases.append(Remote)
    try:
        return RemoteClass(str(name), tuple(bases), namespace)
    except TypeError:  # bases that do not go together here
        return RemoteClass(str(name), (Remote,), namespace)


# --- classes that the other side derives from ours -------------------------------------------------------------------


def _member(value) -> list:
    """A thing in the body of a class, to be made again on the other side."""
    if isinstance(value, types.FunctionType):
        return ["function", value]
    if isinstance(value, staticmethod | classmethod):
        return [type(value).__name__, value.__func__]
    if isinstance(value, property):
        return ["property", value.fget, value.fset, value.fdel]
    return ["value", value]


def _method(function):
    return None if function is None else lambda *arguments, **named: function(*arguments, **named)


def subclass(bases: tuple, name: str, members: dict, named: dict) -> type:
    """On the side of the bases: the class whose methods are the other side's."""
    namespace = {"__module__": bases[0].__module__}
    for key, (kind, *content) in members.items():
        if kind == "function":
            namespace[key] = _method(*content)
        elif kind in ("staticmethod", "classmethod"):
            namespace[key] = (staticmethod if kind == "staticmethod" else classmethod)(_method(*content))
        elif kind == "property":
            namespace[key] = property(*map(_method, content))
        else:
            (namespace[key],) = content
    return types.new_class(name, bases, named, lambda body: body.update(namespace))


def member(kind: type, instance, name: str):
    """What `super()` finds in a class: its own attribute, bound to an instance."""
    if name in getattr(instance, "__dict__", ()) and not hasattr(type(vars(kind)[name]), "__set__"):
        return vars(instance)[name]
    attribute = vars(kind)[name]
    return attribute.__get__(instance, type(instance)) if hasattr(type(attribute), "__get__") else attribute
