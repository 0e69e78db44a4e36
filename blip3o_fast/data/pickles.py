"""Pickles from outside, interpreted and never executed.

A pickle is a program for a stack machine. This module runs the opcodes that build plain data and
nothing else: there is no import and no call. A name that a pickle refers to is looked up in an
exact table, and stands there for a function of this package that records where data lies. Whatever
else a file names, at any depth, is refused.

Bytes are not read: they become an ``Extent`` of the file, so a pickle of any size takes little
memory. The opcodes are those of protocols 2 to 5 (PEP 307, PEP 3154, PEP 574).
"""

import reprlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable


class PickleError(ValueError):
    """A pickle that is truncated, malformed, or wants more than to hold data."""


class Extent(NamedTuple):
    """Bytes of a file that were not read: ``length`` of them from ``offset``."""

    offset: int
    length: int


class Global(NamedTuple):
    """A name that a pickle refers to; only a name."""

    module: str
    name: str


@runtime_checkable
class Stateful(Protocol):
    """An object under construction that a pickle completes with a BUILD opcode."""

    def set_state(self, state: Any) -> None:
        """Take the state, a value made of plain data and extents."""
        ...


class _Mark:
    """Where a variable number of arguments begins on the stack."""


_MARK = _Mark()


class Machine:
    """The stack machine.

    Args:
        path: for messages, and for arrays that will be read later.
        file: open at any position.
        begin, end: bytes of the file that the machine may read.
        known: the names that it knows, and what builds their values from arguments; None for a name
            that may be an argument and not be called.
        persistent: builds the value of a persistent identifier; None refuses them.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        begin: int,
        end: int,
        known: "Mapping[Global, Builder | None]",
        persistent: "Builder | None" = None,
    ) -> None:
        self.path, self.file, self.end = path, file, end
        self.known, self.persistent = known, persistent
        self.position = begin
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        file.seek(begin)

    def run(self) -> Any:
        """The object that the next pickle in the file builds.

        Raises:
            PickleError: naming the file.
        """
        try:
            return self._run()
        except PickleError:
            raise
        except _MISFITS as error:
            raise self.error(f"malformed pickle: {error!r}") from error

    def _run(self) -> Any:
        self.stack, self.memo = [], {}
        while True:
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                (result,) = self.stack
                return result
            if code not in _OPCODES:
                raise self.refusal(f"opcode 0x{code:02x} at byte {self.position - 1}")
            _OPCODES[code](self)

    def error(self, text: str) -> PickleError:
        """An error that names the file."""
        return PickleError(f"{self.path.name}: {text}")

    def refusal(self, what: str) -> PickleError:
        """The error for a pickle that wants more than to hold data."""
        return self.error(
            f"refused: expected a pickle of tensors and plain data, got {what}; nothing of it ran"
        )

    def skip(self, length: int) -> Extent:
        """Pass over ``length`` bytes, which must be there."""
        if length > self.end - self.position:
            left = self.end - self.position
            raise self.error(f"truncated: expected {length} bytes at {self.position}, got {left}")
        extent = Extent(self.position, length)
        self.position += length
        self.file.seek(self.position)
        return extent

    def take(self, length: int) -> bytes:
        """Read ``length`` bytes."""
        if length > self.end - self.position:
            self.skip(length)
        self.position += length
        return self.file.read(length)

    def number(self, layout: str) -> int:
        """Read one little-endian number."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))[0]

    def line(self) -> str:
        """Read text up to a newline."""
        text = self.file.readline(1024)
        self.position += len(text)
        return text.rstrip(b"\n").decode("ascii")

    def text(self, layout: str) -> str:
        """Read a counted string."""
        return self.take(self.number(layout)).decode("utf-8", "surrogatepass")

    def marked(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def push_global(self, module: Any, name: Any) -> None:
        """Push a name, if it is one of the known."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refusal(f"a name made of {type(module).__name__} and {type(name).__name__}")
        found = Global(module, name)
        if found not in self.known:
            raise self.refusal(f"the name {module}.{name}")
        self.stack.append(found)

    def reduce(self) -> None:
        """Build what a known name stands for."""
        arguments = self.stack.pop()
        function = self.stack.pop()
        builder = self.known[function] if isinstance(function, Global) else None
        if builder is None or not isinstance(arguments, tuple):
            called = ".".join(function) if isinstance(function, Global) else reprlib.repr(function)
            raise self.refusal(f"a call of {called}")
        self.stack.append(builder(self, arguments))

    def build(self) -> None:
        """Give an array or a dtype its state."""
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Stateful):
            raise self.refusal(f"a state for {type(target).__name__}")
        target.set_state(state)

    def set_items(self, pairs: list[Any]) -> None:
        """Put alternating keys and values into the dict on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise self.refusal(f"items for {type(self.stack[-1]).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing a tuple of tuples that share their parts can take for ever.
            if not isinstance(key, (str, int, float, NoneType)):
                raise self.refusal(f"a {type(key).__name__} as a key of a dict")
            self.stack[-1][key] = value

    def append(self, items: list[Any]) -> None:
        """Extend the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise self.refusal(f"items for {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def tuple_of(self, count: int) -> None:
        """Replace the topmost ``count`` objects by a tuple of them."""
        if count > len(self.stack):
            raise IndexError("empty stack")
        at = len(self.stack) - count
        self.stack[at:] = [tuple(self.stack[at:])]


Builder = Callable[[Machine, tuple[Any, ...]], Any]
"""Makes a value from the arguments that a pickle gives."""

# What opcodes that do not fit together raise here.
_MISFITS = (
    *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, struct.error),
)


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    m.push_global(m.stack.pop(), name)


def _long(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(int.from_bytes(m.take(m.number(layout)), "little", signed=True))


def _number(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.number(layout))


def _bytes(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.skip(m.number(layout)))


def _text(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.text(layout))


def _memoize(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.memo.__setitem__(m.number(layout), m.stack[-1])


def _recall(layout: str) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.memo[m.number(layout)])


def _persistent(m: Machine) -> None:
    if m.persistent is None:
        raise m.refusal("a persistent object")
    m.stack.append(m.persistent(m, m.stack.pop()))


_OPCODES: dict[int, Callable[[Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME: a hint for readers that buffer
    ord("("): lambda m: m.stack.append(_MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.marked(),
    ord("2"): lambda m: m.stack.append(m.stack[-1]),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("K"): _number("B"),
    ord("M"): _number("H"),
    ord("J"): _number("i"),
    0x8A: _long("B"),
    0x8B: _long("I"),
    ord("G"): lambda m: m.stack.append(struct.unpack(">d", m.take(8))[0]),
    ord("C"): _bytes("B"),
    ord("B"): _bytes("I"),
    0x8E: _bytes("Q"),
    0x96: _bytes("Q"),
    0x8C: _text("B"),
    ord("X"): _text("I"),
    0x8D: _text("Q"),
    ord("]"): lambda m: m.stack.append([]),
    ord("l"): lambda m: m.stack.append(m.marked()),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    ord(")"): lambda m: m.stack.append(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): lambda m: m.stack.append(tuple(m.marked())),
    ord("}"): lambda m: m.stack.append({}),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.marked()),
    ord("q"): _memoize("B"),
    ord("r"): _memoize("I"),
    0x94: lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    ord("h"): _recall("B"),
    ord("j"): _recall("I"),
    ord("c"): lambda m: m.push_global(m.line(), m.line()),
    0x93: _stack_global,
    ord("R"): lambda m: m.reduce(),
    ord("b"): lambda m: m.build(),
    ord("Q"): _persistent,
}
