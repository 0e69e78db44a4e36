"""Frozen records from JSON: unknown keys and wrong types are refused by name."""

import types
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin

Record = TypeVar("Record")


def json_object(kind: str, values: Any) -> dict[str, Any]:
    """A copy of ``values``, which must be a JSON object."""
    if not isinstance(values, dict):
        raise ValueError(f"{kind}: expected a JSON object, got {type(values).__name__}")
    return dict(values)


def check_keys(kind: str, values: Mapping[str, Any], cls: Any) -> None:
    """Raise ``ValueError`` for a key that dataclass ``cls`` lacks, naming the nearest it has."""
    names = [f.name for f in fields(cls)]
    for name in values:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"unknown {kind} key {name!r}{hint}")


def check_types(kind: str, record: Any) -> None:
    """Raise ``ValueError`` for a field of the dataclass ``record`` whose value has another type."""
    for f in fields(record):
        value = getattr(record, f.name)
        if not _fits(value, f.type):
            expected = getattr(f.type, "__name__", str(f.type)) if type(f.type) is type else f.type
            raise ValueError(f"{kind}: {f.name}: expected {expected}, got {value!r}")


def build(cls: type[Record], kind: str, values: Any) -> Record:
    """An instance of dataclass ``cls`` from a JSON object.

    Raises:
        ValueError: for an unknown key, a missing one, or whatever ``cls`` itself refuses.
    """
    values = json_object(kind, values)
    check_keys(kind, values, cls)
    try:
        return cls(**values)
    except TypeError as error:  # the only kind left: a required field is missing
        missing = str(error).rpartition(": ")[2]
        raise ValueError(f"{kind}: missing {missing}") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the annotated type; JSON's 1 is also a float, its true no int."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return any(_fits(value, option) for option in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if kind is float:
        return type(value) in (int, float)
    if kind in (int, bool, str):
        return type(value) is kind
    return isinstance(value, origin or kind)
