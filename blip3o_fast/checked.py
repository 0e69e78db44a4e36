"""Dataclasses whose fields are checked and that are read from JSON.

A field's annotation says what it may hold, in plain types, ``Literal`` words and the ranges below.
``flags`` makes command lines of the same dataclasses.
"""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from blip3o_fast.untrusted import reading

Record = TypeVar("Record")


class Range(NamedTuple):
    """Numbers from ``low`` up to, but not including, ``below``.

    ``open`` leaves ``low`` out too, ``closed`` takes ``below`` in.
    """

    low: float
    below: float = math.inf
    open: bool = False
    closed: bool = False

    def __contains__(self, value: Any) -> bool:
        inside = self.low <= value < self.below and not (self.open and value == self.low)
        return inside or (self.closed and value == self.below)

    def __str__(self) -> str:
        start = f"{'more than' if self.open else 'at least'} {self.low:g}"
        end = f" and {'at most' if self.closed else 'below'} {self.below:g}"
        return start + (end if math.isfinite(self.below) else "")


_DEEPEST = 64  # levels of JSON

Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, closed=True)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open=True)]


def check(record: Any, what: str = "", error: type[ValueError] = ValueError) -> None:
    """Check the type and the range of every field of a dataclass.

    Args:
        record: the dataclass.
        what: begins the message.
        error: raised with the name of the first bad field, what was expected and what came.
    """
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        expected = _unmet(value, field.type)
        if expected is not None:
            name = f"{what}: {field.name}" if what else field.name
            raise error(f"{name}: expected {expected}, got {value!r}")


def check_names(
    cls: Any, names: Iterable[str], what: str, error: type[ValueError] = ValueError
) -> None:
    """Raise ``error`` for a name that dataclass ``cls`` lacks, naming the nearest that it has."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            hint = question(name, known) or f"; known: {', '.join(known)}"
            raise error(f"unknown {what} {name!r}{hint}")


def question(word: str, known: Iterable[str]) -> str:
    """``; did you mean`` and the nearest known word; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def from_json(
    cls: type[Record], values: Any, what: str, error: type[ValueError] = ValueError
) -> Record:
    """An instance of dataclass ``cls`` from a parsed JSON object; its inner records alike.

    Lists become tuples where a tuple is expected.

    Raises:
        error: for an unknown name, a missing one, or whatever ``cls`` itself refuses.
    """
    values = json_object(what, values, error)
    check_names(cls, values, f"{what} key", error)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    converted = {
        name: _from_json(value, fields[name].type, name, error) for name, value in values.items()
    }
    missing = [name for name, field in fields.items() if is_required(field) and name not in values]
    if missing:
        raise error(f"{what}: missing {', '.join(missing)}")
    return cls(**converted)


def read_json(path: Path, largest: int = 1 << 28) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        largest: bytes beyond which nothing is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is larger or holds no JSON object.
    """
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{path}: expected at most {largest} bytes of JSON, got {size}")
    with reading(path, "JSON"):
        values = parse_json(path.read_bytes())
    return json_object(str(path), values)


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` without the numbers that JSON does not have, and no deeper than 64 levels.

    Raises:
        ValueError: saying what is wrong.
    """
    try:
        values = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"more than {_DEEPEST} levels") from None
    level = [values]
    for _ in range(_DEEPEST + 1):
        level = [x for x in level if isinstance(x, dict | list)]
        if not level:
            return values
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    raise ValueError(f"more than {_DEEPEST} levels")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value


def json_object(what: str, values: Any, error: type[ValueError] = ValueError) -> dict[str, Any]:
    """A copy of ``values``, which must be a JSON object."""
    if not isinstance(values, dict):
        raise error(f"{what}: expected a JSON object, got {type(values).__name__}")
    return dict(values)


def is_required(field: "dataclasses.Field[Any]") -> bool:
    """Whether a field has no default."""
    return field.default is field.default_factory is dataclasses.MISSING


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    inner = base_type(kind)
    return get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (kind,)


def describe(kind: Any) -> str:
    """A type in words."""
    return " or ".join(_word(member) for member in alternatives(kind))


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "none",
}


def _word(member: Any) -> str:
    base = base_type(member)
    origin, arguments = get_origin(base), get_args(base)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"a list of {count}{base_type(arguments[0]).__name__}"
    return _WORDS.get(base) or str((origin or base).__name__)


def base_type(kind: Any) -> Any:
    """A type without its annotations."""
    return base_type(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def annotations(kind: Any) -> tuple[Any, ...]:
    """The annotations of a type."""
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _unmet(value: Any, kind: Any) -> str | None:
    """What was expected of a value that is not of a type or not in its range; else None."""
    of_type = [member for member in alternatives(kind) if _fits(value, member)]
    if not of_type:
        return describe(kind)
    complaints = [_out_of_range(value, member) for member in of_type]
    return None if None in complaints else complaints[0]


def _out_of_range(value: Any, member: Any) -> str | None:
    if get_origin(base_type(member)) is tuple:
        unmet = (_out_of_range(item, get_args(base_type(member))[0]) for item in value)
        return next((expected for expected in unmet if expected is not None), None)
    ranges = (part for part in annotations(member) if isinstance(part, Range))
    return next((str(part) for part in ranges if value not in part), None)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; an integer is also a number, a boolean is neither."""
    kind = base_type(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
    if kind in (int, bool, str):
        return type(value) is kind
    return isinstance(value, origin or kind)


def _from_json(value: Any, kind: Any, what: str, error: type[ValueError]) -> Any:
    """A JSON value as the type expects it; what does not fit is left for ``check``."""
    for member in map(base_type, alternatives(kind)):
        if isinstance(value, dict) and dataclasses.is_dataclass(member):
            return from_json(member, value, what, error)  # pyright: ignore[reportArgumentType]
        if isinstance(value, list) and get_origin(member) is tuple:
            return tuple(_from_json(item, get_args(member)[0], what, error) for item in value)
    return value
