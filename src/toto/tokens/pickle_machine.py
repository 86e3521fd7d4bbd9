"""Pickles read as descriptions: what a stream would build is noted down, and nothing of it is built.

Unpickling is running a program that the file brings along. This machine goes through the same program with the same
stack and memo, but where the program wants a function or class it writes down the name, and where it wants a call it
writes down the call. It imports nothing and calls nothing that a stream names, and every name is held against a list.
The operations are those of protocols 0 to 5 (`pickletools.opcodes`), split into words by `pickletools.genops`.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import IO, Any, Final, cast, final

MOST_OPERATIONS: Final = 2_000_000  # of one stream; a checkpoint of a thousand tensors has some fifty thousand
MOST_AT_ONCE: Final = 2**26  # bytes of one string or number
LAST_PROTOCOL: Final = 5


@final
class Reference:
    """The name of a function or class."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    @property
    def dotted(self) -> str:
        """The whole name, as an import would spell it."""
        return f"{self.module}.{self.name}"


@final
class Call:
    """A call that was not made: the function or class, its arguments, and what the result was to be filled with.

    Attributes:
        function: a `Reference` where the stream is an honest one.
        args: positional arguments.
        state: what `__setstate__` would get, None where nothing came.
        items: what would be appended.
        pairs: keys and values that would be set.
    """

    __slots__ = ("args", "function", "items", "pairs", "state")

    def __init__(self, function: object, args: tuple[object, ...]):
        self.function, self.args = function, args
        self.state: object = None
        self.items: list[object] = []
        self.pairs: list[tuple[object, object]] = []


@final
class Pairs:
    """A dictionary as its keys and values in the order they came; keys may be anything and may repeat."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[object, object]]):
        self.pairs = pairs


@final
class Persistent:
    """Something that lies outside of the stream, by the identity that the stream gives it."""

    __slots__ = ("identity",)

    def __init__(self, identity: object):
        self.identity = identity


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What was found in one stream.

    Attributes:
        value: what it describes: plain values, tuples, lists (sets too), and the classes above. It may hold itself.
        refused: names outside of the list, in their order, each once.
        fault: what is malformed first, None for a well-formed stream.
        persistent: every persistent identity.
    """

    value: object
    refused: tuple[str, ...]
    fault: str | None
    persistent: tuple[object, ...]


@final
class Window:
    """A part of an open file as a file of its own; whoever reads past its end gets less.

    No more than `MOST_AT_ONCE` bytes come at once, so that a length that lies costs nothing.
    """

    def __init__(self, handle: IO[bytes], start: int, size: int):
        self._handle, self._start, self._size = handle, start, size
        handle.seek(start)

    def read(self, count: int = -1) -> bytes:
        """The next bytes, all that are left where `count` is negative."""
        return self._handle.read(self._clipped(count))

    def readline(self, count: int = -1) -> bytes:
        """The next bytes up to a line's end."""
        return self._handle.readline(min(self._clipped(count), MOST_AT_ONCE))

    def tell(self) -> int:
        """The place in the part."""
        return self._handle.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place: from the start (0), from here (1) or from the end (2)."""
        place = offset + (0, self.tell(), self._size)[whence]
        if not 0 <= place <= self._size:
            raise ValueError("a place outside of the file")
        self._handle.seek(self._start + place)
        return place

    def skip(self, count: int) -> bool:
        """Leave bytes out; False where there are not so many."""
        if not 0 <= count <= self._size - self.tell():
            return False
        self._handle.seek(count, 1)
        return True

    def _clipped(self, count: int) -> int:
        left = max(0, self._size - self.tell())
        wanted = left if count < 0 else min(count, left)
        if count > 0 and wanted > MOST_AT_ONCE:
            raise ValueError(f"more than {MOST_AT_ONCE} bytes at once")
        return min(wanted, MOST_AT_ONCE)


def scan_pickle(stream: Window, allowed: Collection[str]) -> Scan:
    """Go through one stream up to its STOP; the window then stands behind it.

    Args:
        stream: where it begins.
        allowed: dotted names that may occur. Others are listed, and the scan goes on to find all of them.
    """
    machine = _Machine(allowed)
    value: object = None
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], stream))):
            if count >= MOST_OPERATIONS:
                machine.note(f"more than {MOST_OPERATIONS} operations")
                break
            if operation.name == "STOP":
                value = machine.pop()
            else:
                _OPERATIONS[operation.name](machine, argument)
    except (ValueError, OverflowError) as error:
        machine.note(printable(str(error)))
    return Scan(
        value=value,
        refused=tuple(machine.refused),
        fault=machine.fault,
        persistent=tuple(machine.persistent),
    )


def printable(text: str, most: int = 100) -> str:
    """Text from a file as a message may show it: short, on one line, without control characters."""
    shown = ascii(text[: most + 1])[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}..."


@final
class _Machine:
    """Stack, marks and memo. What an honest stream never does is noted as a fault, and the scan goes on."""

    def __init__(self, allowed: Collection[str]):
        self._allowed = allowed
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self.refused: dict[str, None] = {}
        self.persistent: list[object] = []
        self.fault: str | None = None

    def note(self, fault: str) -> None:
        self.fault = self.fault or fault

    def push(self, value: object) -> None:
        self._stack.append(value)

    def pop(self) -> object:
        if self._stack:
            return self._stack.pop()
        self.note("its stack is empty")
        return None

    def top(self) -> object:
        if self._stack:
            return self._stack[-1]
        self.note("its stack is empty")
        return None

    def mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[object]:
        """What was pushed since the last mark, taken off together with it."""
        taken = self._stack
        if not self._marked:
            self.note("a mark is missing")
        self._stack = self._marked.pop() if self._marked else []
        return taken

    def discard(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def discard_to_mark(self, _: Any) -> None:
        self.since_mark()

    def buffer(self, _: Any) -> None:
        self.note("a buffer outside of the file")
        self.push(None)

    def put(self, key: int) -> None:
        if key < 0:
            self.note("a negative place in the memo")
        self._memo[key] = self.top()

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.top()

    def get(self, key: int) -> None:
        if key not in self._memo:
            self.note("nothing at this place of the memo")
        self.push(self._memo.get(key))

    def refer(self, module: str, name: str) -> Reference:
        """Write a name down; with a dot inside it would reach through attributes, which no name of the list does."""
        reference = Reference(module, name)
        if "." in name or reference.dotted not in self._allowed:
            current = _current(module, name)
            self.refused[reference.dotted + (f" (now {current})" if current != reference.dotted else "")] = None
        return reference

    def refer_by_text(self, argument: str) -> Reference:
        module, _, name = argument.partition(" ")
        return self.refer(module, name)

    def refer_by_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if isinstance(module, str) and isinstance(name, str):
            self.push(self.refer(module, name))
        else:
            self.note("a reference whose name is no text")
            self.push(None)

    def refer_by_code(self, code: int) -> None:
        self.refused[f"extension code {code}"] = None
        self.push(None)

    def persist(self, identity: object) -> None:
        self.persistent.append(identity)
        self.push(Persistent(identity))

    def call(self, function: object, args: object) -> None:
        if not isinstance(args, tuple):
            self.note("arguments that are no tuple")
            args = (args,)
        self.push(Call(function, args))

    def reduce(self, _: Any) -> None:
        args, function = self.pop(), self.pop()
        self.call(function, args)

    def reduce_with_keywords(self, _: Any) -> None:
        keywords, args, function = self.pop(), self.pop(), self.pop()
        if not isinstance(keywords, Pairs):
            self.note("keywords that are no dictionary")
        elif keywords.pairs:
            args = (*args, keywords) if isinstance(args, tuple) else args
        self.call(function, args)

    def instance(self, argument: str) -> None:
        self.push(Call(self.refer_by_text(argument), tuple(self.since_mark())))

    def instance_by_stack(self, _: Any) -> None:
        items = self.since_mark()
        if not items:
            self.note("an object without a class")
        self.push(Call(items[0] if items else None, tuple(items[1:])))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Call):
            target.state = state
        else:
            self.note("a state for what is no object")

    def append(self, items: list[object]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Call):
            target.items.extend(items)
        else:
            self.note("items for what is no list")

    def set_items(self, items: list[object]) -> None:
        target = self.top()
        if isinstance(target, Pairs | Call):
            target.pairs.extend(self.paired(items))
        else:
            self.note("keys for what is no dictionary")

    def paired(self, items: list[object]) -> list[tuple[object, object]]:
        if len(items) % 2:
            self.note("a key without a value")
        return list(zip(items[::2], items[1::2], strict=False))

    def protocol(self, number: int) -> None:
        if number > LAST_PROTOCOL:
            self.note(f"pickle protocol {number}")

    def taken(self, count: int) -> list[object]:
        """The last values of the stack in their order."""
        return [self.pop() for _ in range(count)][::-1]


def _current(module: str, name: str) -> str:
    """What Python 3 takes a name of Python 2 for, as pickles up to protocol 2 spell them."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[module, name]
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def _constant(value: object) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(tuple(machine.taken(count)))


def _nothing(_machine: _Machine, _: Any) -> None:
    pass


# What each operation does to a machine, with the argument that stands in the stream. Sets are read as lists.
_OPERATIONS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    # the frame of the stream
    "PROTO": _Machine.protocol,
    "FRAME": _nothing,
    # plain values
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _Machine.push),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "NEXT_BUFFER": _Machine.buffer,
    "READONLY_BUFFER": _nothing,
    # containers
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.since_mark()),
    "EMPTY_DICT": lambda machine, _: machine.push(Pairs([])),
    "DICT": lambda machine, _: machine.push(Pairs(machine.paired(machine.since_mark()))),
    "APPEND": lambda machine, _: machine.append(machine.taken(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.taken(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    # the stack and the memo
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_to_mark,
    "DUP": lambda machine, _: machine.push(machine.top()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    # names
    "GLOBAL": lambda machine, argument: machine.push(machine.refer_by_text(argument)),
    "STACK_GLOBAL": _Machine.refer_by_stack,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.refer_by_code),
    # objects
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.reduce_with_keywords,
    "INST": _Machine.instance,
    "OBJ": _Machine.instance_by_stack,
    "BUILD": _Machine.build,
    "PERSID": _Machine.persist,
    "BINPERSID": lambda machine, _: machine.persist(machine.pop()),
}
