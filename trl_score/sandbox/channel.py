"""
Values between the process that holds the program and the one that holds its tests.

Only plain data crosses, as JSON, and is built anew as exact builtin types on the other side: no code of the program ever
takes part in a comparison with what a test expects. What is not plain (an instance, a generator, a function, a class)
stays where it is, and the other side gets a stand-in (remote.py) that asks over the channel.

Imports the standard library and its neighbour only, as it runs in an interpreter that has nothing else.
"""

import asyncio
import base64
import builtins
import cmath
import collections
import contextlib
import copy
import dataclasses
import datetime
import decimal
import fractions
import functools
import io
import itertools
import json
import math
import operator
import os
import pathlib
import struct
import sys
import threading
import types
import unittest
import uuid

import remote
from remote import Lost, RemoteClass, Unsupported


MAX_DEPTH = 200  # levels of nesting
MAX_FRAME = 16 << 20  # bytes of one message
MAX_TEXT = 2000  # characters of an error's text
MAX_ERROR = 20_000  # characters of an error's arguments and class, as they are sent
MAX_WATCHED = 1000  # objects in a list or dictionary that is written back when it changes
MAX_PRINTED = 1 << 20  # bytes that a program prints before the rest is thrown away
CHANGED = "the program changed an argument: that reaches the tests only with `mutable_arguments=True`"
ENDS_OF_LOOPS = (StopIteration, StopAsyncIteration, GeneratorExit)

# What a program may name instead of sending it. Nothing here reads files, code or frames.
BUILTINS = {
    name: getattr(builtins, name)
    for name in (
        "abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter float format "
        "frozenset hash hex id int isinstance issubclass iter len list map max min next object oct ord pow print range "
        "repr reversed round set slice sorted str sum tuple type zip Ellipsis NotImplemented"
    ).split()
} | {name: value for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
BUILTINS |= {kind.__name__: kind for kind in (type(None), BaseException, SystemExit, KeyboardInterrupt, GeneratorExit)}
for _module in (math, cmath, operator):
    BUILTINS |= {
        f"{_module.__name__}.{name}": value
        for name, value in vars(_module).items()
        if isinstance(value, types.BuiltinFunctionType) and not name.startswith("_") and name != "call"
    }
for _kind in (str, bytes, int, float, list, tuple, dict, set, frozenset):  # `str.lower`
    BUILTINS |= {
        f"{_kind.__name__}.{name}": value
        for name, value in vars(_kind).items()
        if isinstance(value, types.MethodDescriptorType)
    }
NAME_OF_BUILTIN = {id(value): name for name, value in BUILTINS.items()}
TEXTS = {  # rebuilt from their text
    kind.__name__: kind
    for kind in (
        decimal.Decimal, uuid.UUID, pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath, datetime.date,
        datetime.time, datetime.datetime,
    )
}  # fmt: skip
MADE = {  # rebuilt on the program's side with what they were made from: no round trip for each item of a sort
    kind.__name__: kind
    for kind in (operator.itemgetter, operator.attrgetter, operator.methodcaller, functools.partial)
}
COLLECTIONS = (collections.Counter, collections.OrderedDict, collections.defaultdict)
OF_ATTRIBUTES = frozenset("__getattr__ __getattribute__ __setattr__ __delattr__ __missing__".split())
MODULES = frozenset(
    "bisect calendar cmath collections copy datetime decimal fractions functools hashlib heapq itertools json math "
    "numbers operator random re statistics string textwrap time typing".split()
)


class Unsendable(Exception):
    """This value is too deep or too large to be sent."""


def _reflected(operation):
    return lambda target, other: operation(other, target)


def _base_items(target):
    """The items of an object of a subclass of a builtin collection, by the base's own methods."""
    for base in remote.CONTAINERS:
        if isinstance(target, base):
            return base(dict.items(target)) if base is dict else base(base.__iter__(target))
    raise TypeError("not a collection")


def _wait_for(awaitable):
    async def wait():
        return await awaitable

    if "loop" not in _LOOP:
        _LOOP["loop"] = asyncio.new_event_loop()
    return _LOOP["loop"].run_until_complete(wait())


ARITHMETIC = "add sub mul matmul truediv floordiv mod pow lshift rshift and xor or".split()
_LOOP: dict = {}  # the one event loop of this process
OPERATIONS = {
    "call": lambda target, /, *arguments, **named: target(*arguments, **named),
    "getattr": getattr, "setattr": setattr, "delattr": delattr, "dir": dir, "copy": copy.copy, "deepcopy": copy.deepcopy,
    "setitem": operator.setitem, "delitem": operator.delitem, "iter": iter, "next": next, "reversed": reversed,
    "send": lambda target, value: target.send(value), "hash": hash, "len": len, "bool": bool, "int": int, "float": float,
    "complex": complex, "str": str, "repr": repr, "format": format, "bytes": bytes, "fspath": os.fspath, "round": round,
    "abs": abs, "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil, "divmod": divmod, "rdivmod": _reflected(divmod),
    "length_hint": operator.length_hint, "index": operator.index, "items": _base_items, "member": remote.member,
    "isinstance": lambda target, instance: isinstance(instance, target),
    "issubclass": lambda target, other: issubclass(other, target),
    "enter": lambda target: type(target).__enter__(target),
    "exit": lambda target, *error: bool(type(target).__exit__(target, *error)),
    "dataclass": lambda target, name, /, *arguments, **named: getattr(dataclasses, name)(target, *arguments, **named),
    "await": _wait_for, "aiter": lambda target: type(target).__aiter__(target),
    "anext": lambda target: _wait_for(type(target).__anext__(target)),
    "aenter": lambda target: _wait_for(type(target).__aenter__(target)),
    "aexit": lambda target, *error: bool(_wait_for(type(target).__aexit__(target, *error))),
}  # fmt: skip
for _name in "getitem contains neg pos invert eq ne lt le gt ge".split():
    OPERATIONS[_name] = getattr(operator, _name)
for _name in ARITHMETIC:
    _plain = getattr(operator, _name + "_" * (_name in ("and", "or")))
    OPERATIONS |= {_name: _plain, f"r{_name}": _reflected(_plain), f"i{_name}": getattr(operator, f"i{_name}")}
READING = frozenset("iter next len bool int float complex index str repr format hash length_hint eq ne".split())
ON_OBJECTS = {f"{prefix}{name}" for prefix in ("", "r", "i") for name in ARITHMETIC} | set(
    "setitem delitem contains reversed lt le gt ge neg pos invert abs round trunc floor ceil divmod rdivmod bytes items "
    "enter exit".split()
)
CALLABLE_MODULES = ("__main__", "collections", "datetime", "decimal", "fractions")  # of classes


def tests_allow(operation: str, target, *arguments) -> bool:
    """
    What the program may do with a thing of the tests' that was passed to it. It can call a function and use a class of the
    tests and its instances by their public names; it cannot reach code, frames or globals, where the expected values are.
    """
    if operation in READING or operation == "getitem":
        return True
    if operation == "call":
        return _callable_by_program(target)
    kind = target if isinstance(target, type) else type(target)
    own = (kind.__module__ == "__main__" or kind is types.SimpleNamespace) and not issubclass(kind, unittest.TestCase)
    if operation == "getattr":
        if arguments[0] in ("__name__", "__qualname__", "__module__"):
            return isinstance(target, type | types.FunctionType)
        return (own or kind.__module__ == "unittest.mock") and _is_public(arguments[0])
    if operation in ("setattr", "delattr"):
        return own and kind is not target and _is_public(arguments[0])
    return own and operation in ON_OBJECTS


def _is_public(name) -> bool:
    return isinstance(name, str) and not name.startswith("_")


def _callable_by_program(target) -> bool:
    if isinstance(target, type):
        return target.__module__ in CALLABLE_MODULES
    if isinstance(target, types.BuiltinFunctionType):  # a method of plain data, such as `seen.append`
        return type(target.__self__) in (list, dict, set, str, tuple, bytes, bytearray, frozenset, collections.deque)
    if isinstance(target, types.FunctionType | types.MethodType | type(functools.cache(len))):
        return True
    return type(target).__module__ in ("__main__", "unittest.mock")


def everything(operation: str, target, *arguments) -> bool:
    """What the tests may do with a thing of the program's."""
    return True


class Printed(io.BytesIO):
    """What the program prints, for the tests that look at it."""

    def write(self, data) -> int:
        super().write(data[: max(0, MAX_PRINTED - self.tell())])
        return len(data)

    def close(self) -> None:
        """Stays open where the program closes or replaces `sys.stdout`."""

    def taken(self) -> str:
        text = self.getvalue().decode("utf-8", "replace") if self.tell() else ""
        self.seek(0)
        self.truncate()
        return text


class Peer:
    """
    One end of the channel.

    Args:
        file (`int`):
            Descriptor of a stream socket.
        allowed (`Callable`):
            [`tests_allow`] or [`everything`].
        guards (`bool`):
            Whether this is the side of the tests, where nothing may be sent that a test compares with.
        operations (`dict`, *optional*):
            Further operations of this side, by name. They get their arguments without a target.
    """

    def __init__(self, file: int, allowed, guards: bool, operations: dict | None = None):
        self.file, self.allowed, self.guards = file, allowed, guards
        self.own_module = "__main__" if guards else "program"
        self.own = operations or {}
        if not guards:
            self.own |= {"subclass": self.subclass, "call_and_show": self.call_and_show}
        self.things: list = []  # what the other side holds a reference to
        self.index_of: dict[int, int] = {}
        self.described: set[int] = set()  # of them: those that the other side knows
        self.remotes: dict[int, object] = {}  # stand-ins for what the other side holds
        self.classes: dict[int, type] = {}
        self.lock = threading.RLock()
        self.shows_arguments = False
        self.lost = self.unsupported = self.doubts = ""
        self.exits: list[SystemExit] = []  # that came from the other side
        # Lists and dictionaries that were read from attributes of the other side's objects, the last ones, as they were then.
        self.read: collections.deque[list] = collections.deque(maxlen=8)
        self.asked = 0
        self.printed: Printed | None = None

    # --- what the tests do that has no safe answer ---

    def refuse(self, what: str):
        self.unsupported = self.unsupported or what
        self.lost = self.lost or what
        raise Unsupported(what)

    def doubt(self, what: str) -> None:
        """What differs from a run in one process, and matters only if a test fails."""
        self.doubts = self.doubts or what

    # --- plain data ---

    def pack(self, value, depth: int = 0):
        """A tree for JSON. Subclasses of builtin types become their base, by the base's own methods."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int:
            return value if -(1 << 63) <= value < 1 << 63 else {"int": hex(value)}
        if depth > MAX_DEPTH:
            raise Unsendable(f"the value is nested deeper than {MAX_DEPTH} levels")
        depth += 1
        if kind is list:
            return [self.pack(item, depth) for item in value]
        if isinstance(kind, RemoteClass) or kind is RemoteClass:
            if value._trl_peer is self:
                return {"yours": value._trl_id}
        elif id(value) in NAME_OF_BUILTIN and BUILTINS[NAME_OF_BUILTIN[id(value)]] is value:
            return {"builtin": NAME_OF_BUILTIN[id(value)]}
        elif kind is types.ModuleType:
            if value.__name__ in MODULES and sys.modules.get(value.__name__) is value:
                return {"module": value.__name__}
        elif issubclass(kind, type):
            return self.pack_class(value)
        elif self._has_members(kind):
            for base in remote.VALUES:
                if issubclass(kind, base):
                    return {"own": [self.pack_base(value, base, depth), self.pack_reference(value)]}
        elif issubclass(kind, remote.VALUES):
            return self.pack_base(value, next(base for base in remote.VALUES if issubclass(kind, base)), depth)
        elif issubclass(kind, dict):
            items = [[self.pack(key, depth), self.pack(item, depth)] for key, item in dict.items(value)]
            if kind in (collections.Counter, collections.OrderedDict):
                return {kind.__name__: items}
            if kind is collections.defaultdict:
                factory = NAME_OF_BUILTIN.get(id(value.default_factory))
                if factory or value.default_factory is None:
                    return {"defaultdict": [factory, items]}
            return {"dict": items}
        elif issubclass(kind, list):
            return [self.pack(item, depth) for item in list.__iter__(value)]
        elif issubclass(kind, set):
            return {"set": [self.pack(item, depth) for item in set.__iter__(value)]}
        elif issubclass(kind, collections.deque):
            return {"deque": [[self.pack(item, depth) for item in collections.deque.__iter__(value)], value.maxlen]}
        elif issubclass(kind, bytearray):
            return {"bytearray": base64.b64encode(value).decode()}
        elif kind in (range, slice):
            return {kind.__name__: [self.pack(part, depth) for part in (value.start, value.stop, value.step)]}
        elif kind is fractions.Fraction:
            return {"Fraction": [self.pack(value.numerator), self.pack(value.denominator)]}
        elif kind is datetime.timedelta:
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        elif kind is datetime.timezone:
            return {"timezone": self.pack(value.utcoffset(None), depth)}
        elif TEXTS.get(kind.__name__) is kind and type(getattr(value, "tzinfo", None)) in (
            type(None),
            datetime.timezone,
        ):
            return {"text": [kind.__name__, value.isoformat() if hasattr(value, "isoformat") else str(value)]}
        elif self.guards and MADE.get(kind.__name__) is kind:
            made, arguments, *state = value.__reduce__()
            if state:  # a partial: its function, arguments, named arguments
                arguments, named = [state[0][0], *state[0][1]], state[0][2]
            else:
                arguments, named = list(arguments), {}
            if made is kind:
                return {"made": [kind.__name__, self.pack(arguments, depth), self.pack(named, depth)]}
        elif issubclass(kind, BaseException) and id(kind) in NAME_OF_BUILTIN and not vars(value):
            return {"error": [NAME_OF_BUILTIN[id(kind)], self.pack(value.args, depth)]}
        elif kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return self.pack(value.item(), depth)
        return self.pack_reference(value)

    def pack_base(self, value, base: type, depth: int):
        """A value of a subclass of an immutable builtin type, as the base's own methods see it."""
        if base is tuple:
            return {"tuple": [self.pack(item, depth) for item in tuple.__iter__(value)]}
        if base is frozenset:
            return {"frozenset": [self.pack(item, depth) for item in frozenset.__iter__(value)]}
        if base is int:
            return self.pack(int.__pos__(value), depth)
        if base is float:
            return float.__pos__(value)
        if base is str:
            return "".join(str.__iter__(value))
        if base is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        return {"complex": [complex.__pos__(value).real, complex.__pos__(value).imag]}

    def _has_members(self, kind: type) -> bool:
        """Whether a class has methods or fields of its own, so that more of it matters than the items of its base."""
        if issubclass(kind, tuple) and (hasattr(kind, "_fields") or hasattr(kind, "n_fields")):
            return True
        return kind.__module__ == self.own_module and (
            issubclass(kind, COLLECTIONS)
            or any(
                not name.startswith("_") or name in remote.SPECIAL or name in OF_ATTRIBUTES
                for base in kind.__mro__
                if base.__module__ == self.own_module
                for name in vars(base)
            )
        )

    def pack_class(self, kind: type):
        """A class: a reference, with what a local class needs when it is sent first."""
        if id(kind) in NAME_OF_BUILTIN:
            return {"builtin": NAME_OF_BUILTIN[id(kind)]}
        if issubclass(kind, Exception) and self._is_standard(kind):
            return {"standard": [kind.__module__, kind.__qualname__]}
        return self.pack_class_of_instances(kind)

    def pack_class_of_instances(self, kind: type):
        index = self.refer(kind)
        if index in self.described:
            return {"class": [index]}
        self.described.add(index)
        own = kind.__module__ == self.own_module
        members = [*vars(kind)] if own else []
        known = id(kind) in NAME_OF_BUILTIN or (issubclass(kind, Exception) and self._is_standard(kind))
        bases = [kind] if known and issubclass(kind, BaseException) else kind.__bases__
        bases = [{"container": None} if base in remote.CONTAINERS else self.pack_class(base) for base in bases]
        real = kind.__name__ if remote.REAL.get(kind.__name__) is kind else None
        return {"class": [index, kind.__name__, kind.__module__, bases, remote.special_names(kind), members, real]}

    @staticmethod
    def _is_standard(kind: type) -> bool:
        return (
            kind.__module__.partition(".")[0] in sys.stdlib_module_names - {"unittest", "asyncio", "__main__"}
            and getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
        )

    def pack_reference(self, value) -> dict:
        index = self.refer(value)
        if index in self.described:
            return {"mine": [index]}
        kind = self.pack_class_of_instances(type(value))
        arguments = self.pack(value.args) if isinstance(value, BaseException) else None
        self.described.add(index)
        return {"mine": [index, kind, arguments]}

    def refer(self, thing) -> int:
        if (index := self.index_of.get(id(thing))) is None:
            index = self.index_of[id(thing)] = len(self.things)
            self.things.append(thing)
        return index

    def unpack(self, tree):
        """The value of a tree: exact builtin types, and a stand-in for what stayed on the other side."""
        if type(tree) is list:
            return [self.unpack(item) for item in tree]
        if type(tree) is not dict:
            return tree
        ((kind, content),) = tree.items()
        match kind:
            case "int":
                return int(content, 16)
            case "tuple":
                return tuple([self.unpack(item) for item in content])
            case "dict":
                return {self.unpack(key): self.unpack(item) for key, item in content}
            case "Counter" | "OrderedDict":
                return getattr(collections, kind)({self.unpack(key): self.unpack(item) for key, item in content})
            case "defaultdict":
                factory, items = content
                found = {self.unpack(key): self.unpack(item) for key, item in items}
                return collections.defaultdict(factory and BUILTINS[factory], found)
            case "set":  # merged at once, as a display is: some programs wrongly count on the order that results
                return set(frozenset([self.unpack(item) for item in content]))
            case "frozenset":
                return frozenset([self.unpack(item) for item in content])
            case "deque":
                items, size = content
                return collections.deque([self.unpack(item) for item in items], size)
            case "bytes" | "bytearray":
                return BUILTINS[kind](base64.b64decode(content))
            case "complex" | "range" | "slice":
                return BUILTINS[kind](*[self.unpack(part) for part in content])
            case "Fraction":
                return fractions.Fraction(*[self.unpack(part) for part in content])
            case "timedelta":
                return datetime.timedelta(*content)
            case "timezone":
                return datetime.timezone(self.unpack(content))
            case "text":
                made = TEXTS[content[0]]
                return made.fromisoformat(content[1]) if hasattr(made, "fromisoformat") else made(content[1])
            case "made" if not self.guards:
                return MADE[content[0]](*self.unpack(content[1]), **self.unpack(content[2]))
            case "builtin":
                return BUILTINS[content]
            case "container":
                return remote.Container
            case "standard":
                found = getattr(sys.modules[content[0]], content[1])
                if issubclass(found, Exception) and self._is_standard(found):
                    return found
            case "module" if content in MODULES:
                return __import__(content)
            case "error":
                return _exception(BUILTINS[content[0]], self.unpack(content[1]))
            case "class":
                return self.class_of(*content)
            case "own":
                return self.stand_in(*content[1]["mine"], value=self.unpack(content[0]))
            case "mine":
                return self.stand_in(*content)
            case "yours":
                return self.things[int(content)]
        raise ValueError(f"unknown kind {kind!r}")

    def class_of(self, index, name=None, module="", bases=(), specials=(), members=(), real=None) -> type:
        index = int(index)
        if index not in self.classes:
            self.classes[index] = remote.Remote  # while it is described: it may stand below itself
            bases = [self.unpack(base) for base in bases]
            bases = [
                base
                for base in bases
                if isinstance(base, RemoteClass) or base in remote.VALUES or issubclass(base, BaseException)
            ]
            self.classes[index] = remote.make_class(self, index, name, module, bases, specials, members, real)
        return self.classes[index]

    def stand_in(self, index, kind=None, arguments=None, value=None):
        index = int(index)
        if index in self.remotes:
            return self.remotes[index]
        kind = self.unpack(kind)
        if not isinstance(kind, RemoteClass):
            raise ValueError("an object without a class")
        base = next((base for base in remote.VALUES if issubclass(kind, base)), None)
        for each in kind.__mro__:
            if ignored := vars(each).get("_trl_ignored"):
                name = f"`{base.__name__}`" if base else "a builtin collection"
                self.doubt(f"`{ignored}` of `{kind.__name__}`: a subclass of {name} counts as its base")
        if base is not None:
            if type(value) is not base:
                raise ValueError("a value of another type")
            thing = base.__new__(kind, value)
        elif issubclass(kind, BaseException):
            thing = _exception(kind, self.unpack(arguments))
        else:
            thing = object.__new__(kind)
        for name, attribute in (("_trl_id", index), ("_trl_peer", self)):
            object.__setattr__(thing, name, attribute)
        self.remotes[index] = thing
        return thing

    # --- what the other side asks for, beside the operations ---

    def subclass(self, bases, name, members, named) -> int:
        kind = remote.subclass(tuple(bases), name, members, named)
        index = self.refer(kind)
        self.described.add(index)
        return index

    def call_and_show(self, function, arguments: tuple, named: dict) -> tuple:
        """Its result, and the arguments as the call left them."""
        return function(*arguments, **named), arguments, named

    # --- messages ---

    def send(self, message: dict) -> None:
        if self.printed is not None and (text := self.printed.taken()):
            message["out"] = text
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_FRAME:
            raise Unsendable(f"the value takes {len(data):,} bytes, more than {MAX_FRAME:,}")
        data = memoryview(struct.pack("<I", len(data)) + data)
        while data:
            data = data[os.write(self.file, data) :]

    def receive(self) -> dict:
        def read(size: int) -> bytes:
            data = bytearray()
            while len(data) < size:
                if not (part := os.read(self.file, size - len(data))):
                    raise EOFError
                data += part
            return bytes(data)

        (size,) = struct.unpack("<I", read(4))
        if size > MAX_FRAME:
            raise ValueError(f"a message of {size} bytes")
        message = json.loads(read(size))
        if type(message) is not dict:
            raise ValueError("a message that is no object")
        return message

    def call(self, function, arguments: tuple, named: dict):
        if not self.shows_arguments:
            return self.ask("call", function, *arguments, **named)
        result, changed, changed_named = self.ask("call_and_show", function, arguments, named)
        for original, after in zip(arguments, changed, strict=True):
            _put_back(original, after)
        for name, original in named.items():
            _put_back(original, changed_named[name])
        return result

    def ask(self, operation: str, /, *arguments, **named):
        """
        Have the other side do something; meanwhile, do what it asks for.

        Raises:
            `Lost`: If there is no other side any more, or it does not keep to the protocol.
            `Exception`: What the operation raised there, as its nearest builtin class.
        """
        self.write_back()
        value = self.answer_of({"do": operation, "with": self.pack(arguments), "named": self.pack(named)})
        if operation == "getattr" and type(value) in remote.CONTAINERS:
            if len(before := list(itertools.islice(_flat(value), MAX_WATCHED + 1))) <= MAX_WATCHED:
                self.read.append([*arguments, value, before])
        return value

    def write_back(self) -> None:
        """What was read from an attribute and changed here is changed there too: `node.children.append(child)`."""
        for entry in list(self.read):
            target, name, value, before = entry
            now = list(_flat(value))
            if len(now) != len(before) or not all(map(operator.is_, now, before)):
                entry[-1] = now
                try:
                    self.answer_of({"do": "setattr", "with": self.pack((target, name, value)), "named": self.pack({})})
                except Exception:  # a property, an attribute of a frozen dataclass
                    self.doubt(f"`{name}` was changed by the other side, and cannot be set")

    def answer_of(self, request: dict):
        with self.lock:
            if self.lost:
                raise Lost(self.lost)
            self.asked += 1
            try:
                self.send(request)
            except OSError:
                self.lose("its process ended")
            while True:
                try:
                    message = self.receive()
                except (EOFError, OSError):
                    self.lose("its process ended")
                except (ValueError, RecursionError, MemoryError) as error:
                    self.lose(f"it sent no proper message: {type(error).__name__}")
                if self.guards and type(message.get("out")) is str:
                    sys.stdout.write(message["out"])
                if "do" in message:
                    self.serve(message)
                    continue
                try:
                    error = self.error_of(message)
                    value = None if error else self.unpack(message["is"])
                    if message.get("changed"):
                        self.doubt(CHANGED)
                except Exception as fault:  # whatever a hostile message makes of the steps above
                    self.lose(f"it sent no proper message: {type(fault).__name__}")
                if error is not None:
                    raise self.as_raised(error, request["do"]) if self.guards else error
                return value

    def error_of(self, message: dict) -> BaseException | None:
        if "lost" in message:
            self.lose(str(message["lost"])[:MAX_TEXT])
        if "raise" not in message:
            return None
        error = self.unpack(message["raise"])
        if not isinstance(error, BaseException):
            raise ValueError("no exception")
        return error

    def as_raised(self, error: BaseException, operation: str) -> BaseException:
        """What the program raised, unless a construct of the tests would take it for the end of a loop."""
        ends = {"next": StopIteration, "send": StopIteration, "anext": StopAsyncIteration}.get(operation, ())
        if isinstance(error, ENDS_OF_LOOPS) and not isinstance(error, ends):
            name = type(error).__name__
            self.doubt(f"a {name} of the program's that answers no `next` reaches the tests as a RuntimeError")
            return RuntimeError(f"the program raised {name}")
        if isinstance(error, SystemExit):
            self.exits.append(error)
        return error

    def lose(self, why: str):
        self.lost = self.lost or why
        raise Lost(why) from None

    def serve(self, message: dict) -> None:
        """Do what a message asks for, and answer it."""
        try:
            operation, arguments = message["do"], self.unpack(message["with"])
            named = self.unpack(message["named"])
            answer = {}
            if operation in self.own:
                value = self.own[operation](*arguments, **named)
            elif not _is_reference(message["with"]["tuple"][0]) or not self.allowed(operation, *arguments):
                name = arguments[1] if operation == "getattr" else ""
                if name != "__dict__":  # which `functools.wraps` looks for
                    what = f"`{name or operation}` of a `{type(arguments[0]).__name__}` of the tests'"
                    self.doubt(f"the program asked for {what}, which is refused")
                if str(name).startswith("_"):
                    raise AttributeError(name)
                raise PermissionError(f"{operation} is not for this")
            else:
                value = OPERATIONS[operation](*arguments, **named)
                if (
                    value is None
                    and operation == "call"
                    and not self.guards
                    and self.changed(message, arguments, named)
                ):
                    answer["changed"] = True
            self.write_back()
            self.send({"is": self.pack(value), **answer})
        except (Lost, Unsupported):
            raise
        except Unsendable as error:
            self.send({"lost": str(error)})
        except BaseException as error:  # the program's, whatever it is: the other side decides what it means
            self.send(self.describe(error))

    def changed(self, message: dict, arguments: tuple, named: dict) -> bool:
        """Whether a call that returned nothing changed what it was given."""
        if not any(isinstance(each, remote.CONTAINERS) for each in (*arguments, *named.values())):
            return False
        with contextlib.suppress(Exception):
            before = [message["with"]["tuple"][1:], message["named"]]  # without the function itself
            return [self.pack(arguments[1:])["tuple"], self.pack(named)] != before
        return False

    def describe(self, error: BaseException) -> dict:
        if self.guards and isinstance(error, AssertionError):  # its text may tell what was expected
            return {"raise": {"error": ["AssertionError", {"tuple": []}]}}
        described = set(self.described)
        with contextlib.suppress(BaseException):  # of a class of the program's, or for want of memory
            tree = self.pack(error)
            if len(json.dumps(tree)) < MAX_ERROR:
                return {"raise": tree}
        self.described = described
        text = ""
        with contextlib.suppress(BaseException):
            text = str(error)[:MAX_TEXT]
        names = [base.__name__ for base in type(error).__mro__ if id(base) in NAME_OF_BUILTIN]
        return {"raise": {"error": [names[0], {"tuple": [text]}]}}


def _flat(value, depth: int = 0):
    """The objects in a value of lists and dictionaries, one after the other."""
    yield value
    if type(value) in remote.CONTAINERS and depth < 20:
        for item in value.items() if type(value) is dict else value:
            if type(value) is dict:
                yield item[0]
                item = item[1]
            yield from _flat(item, depth + 1)
        yield _flat


def _is_reference(tree) -> bool:
    return type(tree) is dict and "yours" in tree


def _exception(kind: type, arguments: tuple) -> BaseException:
    if not issubclass(kind, BaseException):
        raise ValueError(f"{kind} is no exception")
    if not isinstance(kind, RemoteClass):
        with contextlib.suppress(Exception):
            return kind(*arguments)
    error = kind.__new__(kind, *arguments)
    base = next(base for base in kind.__mro__ if issubclass(base, BaseException) and not isinstance(base, RemoteClass))
    with contextlib.suppress(Exception):  # one that wants other arguments, such as UnicodeDecodeError
        base.__init__(error, *arguments)
    return error


def _put_back(original, changed) -> None:
    """Make a mutable argument what the call left."""
    if type(original) is not type(changed):
        return
    if isinstance(original, list | bytearray):
        original[:] = changed
    elif isinstance(original, dict | set):
        original.clear()
        original.update(changed)
    elif isinstance(original, collections.deque):
        original.clear()
        original.extend(changed)
