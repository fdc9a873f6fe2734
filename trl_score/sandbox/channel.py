"""
Values between the process that holds the program and the one that holds its tests.

Only plain data crosses, as JSON, and is built anew as exact builtin types on the other side: no code of the program ever
takes part in a comparison. Whatever is not plain (an instance, a generator, a function) stays where it is; the other
side gets a [`Remote`], whose attributes, items, calls, iteration, length and text are asked for over the channel.

Imports the standard library only, as it runs in an interpreter that has nothing else.
"""

import base64
import builtins
import collections
import contextlib
import datetime
import decimal
import fractions
import json
import os
import struct
import sys
import types


MAX_DEPTH = 200  # levels of nesting
MAX_FRAME = 16 << 20  # bytes of one message
MAX_TEXT = 2000  # characters of an error's text

# What a program may name instead of sending it. Nothing here reads files, code or frames.
BUILTINS = {
    name: getattr(builtins, name)
    for name in (
        "abs all any ascii bin bool bytearray bytes callable chr complex dict divmod enumerate filter float format "
        "frozenset hash hex id int isinstance issubclass iter len list map max min next object oct ord pow print range "
        "repr reversed round set slice sorted str sum tuple type zip Ellipsis NotImplemented"
    ).split()
} | {name: value for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
BUILTINS["NoneType"] = type(None)
NAME_OF_BUILTIN = {id(value): name for name, value in BUILTINS.items()}
MODULES = frozenset(
    "bisect calendar cmath collections copy datetime decimal fractions functools hashlib heapq itertools json math "
    "numbers operator random re statistics string textwrap time typing".split()
)


class Unsendable(Exception):
    """This value is too deep or too large to be sent."""


class Lost(BaseException):
    """The other side is gone or talks nonsense. No `except Exception` of a test may swallow it."""


class Remote:  # without a docstring: its `__doc__` is to be the other side's
    __slots__ = ("_trl_id", "_trl_peer")

    def __init__(self, peer, id):
        object.__setattr__(self, "_trl_peer", peer)
        object.__setattr__(self, "_trl_id", id)

    def _trl_ask(self, operation, *arguments, **named):
        return self._trl_peer.ask(operation, self, *arguments, **named)

    def __call__(self, *arguments, **named):
        return self._trl_ask("call", *arguments, **named)

    def __getattr__(self, name):
        return self._trl_ask("getattr", name)

    def __setattr__(self, name, value):
        self._trl_ask("setattr", name, value)

    def __getitem__(self, key):
        return self._trl_ask("getitem", key)

    def __setitem__(self, key, value):
        self._trl_ask("setitem", key, value)

    def __iter__(self):
        iterator = self._trl_ask("iter")
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            yield item

    def __next__(self):
        return self._trl_ask("next")

    def __len__(self):
        return self._trl_ask("len")

    def __bool__(self):
        return self._trl_ask("bool")

    def __int__(self):
        return self._trl_ask("int")

    def __float__(self):
        return self._trl_ask("float")

    def __str__(self):
        return self._trl_ask("str")

    def __repr__(self):
        return self._trl_ask("repr")

    # Never asked for: the other side would learn what it is compared with.
    def __eq__(self, other):
        return type(other) is Remote and self._trl_id == other._trl_id

    def __hash__(self):
        return hash(self._trl_id)


OPERATIONS = {
    "call": lambda target, *arguments, **named: target(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "repr": repr,
}


def tests_allow(operation: str, target, *arguments) -> bool:
    """
    What the program may do with a thing of the tests' that was passed to it. It can call a function and use an instance
    of a class of the tests by its public names; it cannot reach code, frames or globals, where the expected values are.
    """
    if operation in ("iter", "next", "len", "bool", "str", "repr", "int", "float"):
        return True
    if operation == "call":
        return isinstance(target, types.FunctionType | types.BuiltinFunctionType | types.MethodType | type)
    own = type(target).__module__ == "tests" and not isinstance(target, type)
    if operation in ("getattr", "setattr"):
        return own and isinstance(arguments[0], str) and not arguments[0].startswith("_")
    return operation == "getitem" or (operation == "setitem" and own)


def everything(operation: str, target, *arguments) -> bool:
    """What the tests may do with a thing of the program's."""
    return True


class Peer:
    """
    One end of the channel.

    Args:
        file (`int`):
            Descriptor of a stream socket.
        allowed (`Callable`):
            [`tests_allow`] or [`everything`].
        operations (`dict`, *optional*):
            Further operations of this side, by name. They get their arguments without a target.
    """

    def __init__(self, file: int, allowed, operations: dict | None = None):
        self.file, self.allowed = file, allowed
        self.own = operations or {}
        self.things: list = []  # what the other side holds a reference to
        self.index_of: dict[int, int] = {}
        self.lost = ""

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
        if kind is Remote:
            if value._trl_peer is self:
                return {"yours": value._trl_id}
        elif id(value) in NAME_OF_BUILTIN and BUILTINS[NAME_OF_BUILTIN[id(value)]] is value:
            return {"builtin": NAME_OF_BUILTIN[id(value)]}
        elif kind is types.ModuleType:
            if value.__name__ in MODULES and sys.modules.get(value.__name__) is value:
                return {"module": value.__name__}
        elif issubclass(kind, tuple):
            return {"tuple": [self.pack(item, depth) for item in tuple.__iter__(value)]}
        elif issubclass(kind, dict):
            return {"dict": [[self.pack(key, depth), self.pack(item, depth)] for key, item in dict.items(value)]}
        elif issubclass(kind, list):
            return [self.pack(item, depth) for item in list.__iter__(value)]
        elif issubclass(kind, set):
            return {"set": [self.pack(item, depth) for item in set.__iter__(value)]}
        elif issubclass(kind, frozenset):
            return {"frozenset": [self.pack(item, depth) for item in frozenset.__iter__(value)]}
        elif issubclass(kind, collections.deque):
            return {"deque": [self.pack(item, depth) for item in collections.deque.__iter__(value)]}
        elif issubclass(kind, int):
            return self.pack(int.__pos__(value), depth)
        elif issubclass(kind, float):
            return float.__pos__(value)
        elif issubclass(kind, str):
            return "".join(str.__iter__(value))
        elif issubclass(kind, bytes | bytearray):
            return {"bytearray" if issubclass(kind, bytearray) else "bytes": base64.b64encode(value).decode()}
        elif kind is complex:
            return {"complex": [value.real, value.imag]}
        elif kind in (range, slice):
            return {kind.__name__: [self.pack(part, depth) for part in (value.start, value.stop, value.step)]}
        elif kind is decimal.Decimal:
            return {"Decimal": str(value)}
        elif kind is fractions.Fraction:
            return {"Fraction": [self.pack(value.numerator), self.pack(value.denominator)]}
        elif kind is datetime.timedelta:
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        elif kind in (datetime.date, datetime.time, datetime.datetime) and getattr(value, "tzinfo", None) is None:
            return {kind.__name__: value.isoformat()}
        elif kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return self.pack(value.item(), depth)
        return {"mine": self.refer(value)}

    def refer(self, thing) -> int:
        if (index := self.index_of.get(id(thing))) is None:
            index = self.index_of[id(thing)] = len(self.things)
            self.things.append(thing)
        return index

    def unpack(self, tree):
        """The value of a tree: exact builtin types, and a [`Remote`] for what stayed on the other side."""
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
            case "set":  # merged at once, as a display is: some programs wrongly count on the order that results
                return set(frozenset([self.unpack(item) for item in content]))
            case "frozenset":
                return frozenset([self.unpack(item) for item in content])
            case "deque":
                return collections.deque([self.unpack(item) for item in content])
            case "bytes" | "bytearray":
                return BUILTINS[kind](base64.b64decode(content))
            case "complex" | "range" | "slice":
                return BUILTINS[kind](*[self.unpack(part) for part in content])
            case "Decimal":
                return decimal.Decimal(content)
            case "Fraction":
                return fractions.Fraction(*[self.unpack(part) for part in content])
            case "timedelta":
                return datetime.timedelta(*content)
            case "date" | "time" | "datetime":
                return getattr(datetime, kind).fromisoformat(content)
            case "builtin":
                return BUILTINS[content]
            case "module" if content in MODULES:
                return __import__(content)
            case "mine":
                return Remote(self, int(content))
            case "yours":
                return self.things[int(content)]
        raise ValueError(f"unknown kind {kind!r}")

    # --- messages ---

    def send(self, message: dict) -> None:
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

    def ask(self, operation: str, *arguments, **named):
        """
        Have the other side do something; meanwhile, do what it asks for.

        Raises:
            `Lost`: If there is no other side any more, or it does not keep to the protocol.
            `Exception`: What the operation raised there, as its nearest builtin class.
        """
        return self.answer_of({"do": operation, "with": self.pack(arguments), "named": self.pack(named)})

    def answer_of(self, request: dict):
        if self.lost:
            raise Lost(self.lost)
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
            if "do" in message:
                self.serve(message)
                continue
            try:
                error = self.error_of(message)
                value = None if error else self.unpack(message["is"])
            except Exception as fault:  # whatever a hostile message makes of the steps above
                self.lose(f"it sent no proper message: {type(fault).__name__}")
            if error is not None:
                raise error
            return value

    def error_of(self, message: dict) -> BaseException | None:
        """What a message raises, as the nearest builtin class that can be made from what came with it."""
        if "lost" in message:
            self.lose(str(message["lost"])[:MAX_TEXT])
        if "raise" not in message:
            return None
        names, arguments, text = message["raise"]
        arguments = [str(text)[:MAX_TEXT]] if arguments is None else self.unpack(arguments)
        for kind in [vars(builtins).get(name) for name in names]:
            if isinstance(kind, type) and issubclass(kind, BaseException):
                with contextlib.suppress(Exception):
                    return kind(*arguments)
                with contextlib.suppress(Exception):  # one that wants other arguments, such as UnicodeDecodeError
                    return kind.__new__(kind, *arguments)
        raise ValueError(f"no exception {names}")

    def lose(self, why: str):
        self.lost = why
        raise Lost(why) from None

    def serve(self, message: dict) -> None:
        """Do what a message asks for, and answer it."""
        try:
            operation, arguments = message["do"], self.unpack(message["with"])
            named = self.unpack(message["named"])
            if operation in self.own:
                value = self.own[operation](*arguments, **named)
            elif "yours" not in message["with"]["tuple"][0] or not self.allowed(operation, *arguments):
                raise PermissionError(f"{operation} is not for this")
            else:
                value = OPERATIONS[operation](*arguments, **named)
            self.send({"is": self.pack(value)})
        except Lost:
            raise
        except Unsendable as error:
            self.send({"lost": str(error)})
        except BaseException as error:  # the program's, whatever it is: the other side decides what it means
            self.send(self.describe(error))

    def describe(self, error: BaseException) -> dict:
        names = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
        text = arguments = None
        try:
            if all(type(argument) in (str, int, float, bool, type(None)) for argument in error.args):
                packed = self.pack(error.args)
                arguments = packed if len(json.dumps(packed)) < MAX_TEXT else None
            text = str(error)[:MAX_TEXT]
        except BaseException:  # of a `__str__` of the program's, or for want of memory
            text = ""
        return {"raise": [names, arguments, text]}
