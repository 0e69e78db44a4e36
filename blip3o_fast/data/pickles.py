"""Pickles from outside, interpreted and never executed.

A pickle is a program for a stack machine. The standard library's machine is restricted here to the
opcodes that build data. It imports nothing: every name in a pickle is looked up in a table, where
it stands for a function of this package that records where data is. What asks for more is not
followed: it becomes ``Unread``, which whoever needs it refuses. So a field that nobody uses does
not stand in the way of the others. Items of a dict whose key is no text and no usual number are
left out.

Bytes are not read: they become an ``Extent`` of the file, so a pickle of any size takes little
memory. This is why the machine is the one written in Python, whose opcodes can be replaced; the one
written in C would read all bytes.
"""

import pickle
import reprlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Self


class PickleError(ValueError):
    """A pickle that is truncated, malformed, or asks for more than data."""


class RefusalError(PickleError):
    """A pickle that asks for more than data."""

    def __init__(self, what: str, file: str) -> None:
        super().__init__(
            f"{file}: refused: expected a pickle of tensors and plain data, got {what}; nothing of "
            "it ran"
        )
        self.what = what


class Extent(NamedTuple):
    """Bytes of a file that were not read: ``length`` of them from ``offset``."""

    offset: int
    length: int


class Global(NamedTuple):
    """A name that a pickle refers to."""

    module: str
    name: str


class Unread:
    """Stands for an object that was not made; prints as what the pickle asked for."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __repr__(self) -> str:
        return self.what

    def append(self, item: Any) -> None:
        """Ignore it."""

    def extend(self, items: Any) -> None:
        """Ignore them."""

    def set_state(self, state: Any) -> None:
        """Ignore it."""


class Stretch:
    """Bytes of a file from ``begin`` to ``end``, read in order and never beyond.

    Raises:
        PickleError: naming the file, when something would be read beyond the end.
    """

    def __init__(self, path: Path, begin: int, end: int) -> None:
        self.path, self.position, self.end = path, begin, end
        self._file = path.open("rb")
        self._file.seek(begin)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, length: int) -> bytes:
        """Read ``length`` bytes."""
        self._require(length)
        self.position += length
        return self._file.read(length)

    def readline(self) -> bytes:
        """Read text up to a newline."""
        line = self._file.readline(min(1024, self.end - self.position))
        self.position += len(line)
        return line

    def skip(self, length: int) -> Extent:
        """Pass over ``length`` bytes, which must be there."""
        self._require(length)
        extent = Extent(self.position, length)
        self.position += length
        self._file.seek(self.position)
        return extent

    def number(self, layout: str) -> int:
        """Read one little-endian number."""
        return struct.unpack("<" + layout, self.read(struct.calcsize("<" + layout)))[0]

    def error(self, text: str) -> PickleError:
        """An error that names the file."""
        return PickleError(f"{self.path.name}: {text}")

    def refusal(self, what: str) -> RefusalError:
        """The error for a pickle that asks for more than data."""
        return RefusalError(what, self.path.name)

    def _require(self, length: int) -> None:
        left = self.end - self.position
        if not 0 <= length <= left:
            raise self.error(f"truncated: expected {length} bytes at {self.position}, got {left}")


_LARGEST_KEY = 1 << 60

Builder = Callable[[Stretch, tuple[Any, ...]], Any]
"""Makes a value from the arguments that a pickle gives."""

# What a malformed sequence of opcodes raises.
_MISFITS = (
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, EOFError, struct.error, pickle.UnpicklingError),
)


def load_data(
    stretch: Stretch, known: Mapping[Global, Builder | None], persistent: Builder | None = None
) -> Any:
    """The object that the next pickle in a stretch builds.

    Args:
        stretch: where to read on.
        known: the names that may be referred to, and what builds their values from arguments; None
            for a name that may be an argument and not be called.
        persistent: builds the value of a persistent identifier; None refuses them.

    Raises:
        PickleError: naming the file; also if the whole object is ``Unread``.
    """
    try:
        found = _DataMachine(stretch, known, persistent).load()
    except PickleError:
        raise
    except _MISFITS as error:
        raise stretch.error(f"malformed pickle: {error!r}") from error
    if isinstance(found, Unread):
        raise stretch.refusal(repr(found))
    return found


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What each opcode does; others are refused."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        def refuse(machine: "_DataMachine") -> None:
            at = machine.stretch.position - 1
            raise machine.stretch.refusal(f"opcode 0x{code:02x} at byte {at}")

        return refuse


_PLAIN = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BININT, pickle.BININT1),
    *(pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.BINUNICODE8, pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_TUPLE, pickle.TUPLE),
    *(pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_DICT, pickle.BINPUT),
    *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL),
    *(pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.APPEND, pickle.APPENDS),
)
"""Opcodes that build numbers, text and containers, or call a method that is overridden here."""


class _DataMachine(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """The standard library's machine without the opcodes that run code."""

    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(
        self,
        stretch: Stretch,
        known: Mapping[Global, Builder | None],
        persistent: Builder | None,
    ) -> None:
        super().__init__(stretch)
        self.stretch, self.known, self.persistent = stretch, known, persistent

    def find_class(self, module: str, name: str) -> Global | Unread:
        """A name; nothing is imported."""
        found = Global(module, name)
        if found == Global("_codecs", "encode"):
            raise self.stretch.refusal("bytes of protocol 2, which protocol=4 would not need")
        return found if found in self.known else Unread(f"the name {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """The value of a persistent identifier."""
        if self.persistent is None:
            raise self.stretch.refusal("a persistent object")
        return self.persistent(self.stretch, pid)

    def frame(self) -> None:
        """Pass over a frame's length, a hint for readers that buffer."""
        self.stretch.skip(8)

    def reduce(self) -> None:
        """Build what a known name stands for."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if isinstance(function, Unread):
            self.append(function)
            return
        builder = self.known[function] if isinstance(function, Global) else None
        if builder is None or not isinstance(arguments, tuple):
            called = ".".join(function) if isinstance(function, Global) else reprlib.repr(function)
            raise self.stretch.refusal(f"a call of {called}")
        try:
            self.append(builder(self.stretch, arguments))
        except RefusalError as refusal:
            self.append(Unread(refusal.what))

    def make(self, parts: int) -> None:
        """An object of a class, from so many parts on the stack: the class and its arguments."""
        maker = self.stack[-parts]
        del self.stack[-parts:]
        if not isinstance(maker, Unread):
            raise self.stretch.refusal(f"an object of {reprlib.repr(maker)}")
        self.append(maker)

    def build(self) -> None:
        """Give an array or a dtype its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if not hasattr(target, "set_state"):
            raise self.stretch.refusal(f"a state for {type(target).__name__}")
        target.set_state(state)

    def set_items(self, pairs: list[Any]) -> None:
        """Put alternating keys and values into the dict on top of the stack."""
        if isinstance(self.stack[-1], Unread):
            return
        if not isinstance(self.stack[-1], dict):
            raise self.stretch.refusal(f"items for {type(self.stack[-1]).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing a tuple of tuples with shared parts can take exponential time, and large
            # integers can be chosen so that all have one hash.
            large = isinstance(key, int) and abs(key) > _LARGEST_KEY
            if not large and isinstance(key, (str, int, float, NoneType)):
                self.stack[-1][key] = value

    dispatch = _Opcodes(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN}  # pyright: ignore[reportAttributeAccessIssue]
        | {
            pickle.FRAME[0]: frame,
            pickle.REDUCE[0]: reduce,
            pickle.BUILD[0]: build,
            pickle.SETITEM[0]: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
            pickle.SETITEMS[0]: lambda m: m.set_items(m.pop_mark()),
            pickle.NEWOBJ[0]: lambda m: m.make(2),
            pickle.NEWOBJ_EX[0]: lambda m: m.make(3),
            pickle.EMPTY_SET[0]: lambda m: m.append(Unread("a set")),
            pickle.ADDITEMS[0]: lambda m: m.pop_mark(),
            pickle.FROZENSET[0]: lambda m: (m.pop_mark(), m.append(Unread("a frozenset"))),
        }
        | {
            code[0]: lambda m, layout=layout: m.append(m.stretch.skip(m.stretch.number(layout)))
            for code, layout in (
                *((pickle.SHORT_BINBYTES, "B"), (pickle.BINBYTES, "I")),
                *((pickle.BINBYTES8, "Q"), (pickle.BYTEARRAY8, "Q")),
            )
        }
    )
