"""The types that an option can have, checked and put into words.

An option is an int, float, bool, str, a literal of several strings, three integers, or a union of
those with each other and None.
"""

import math
import types
from typing import Any, Literal, Union, get_args, get_origin


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type; integers are also numbers, booleans are neither."""
    return any(_is_a(value, member) for member in alternatives(kind))


def _is_a(value: Any, member: Any) -> bool:
    if get_origin(member) is Literal:
        return value in get_args(member)
    if get_origin(member) is tuple:
        expected = get_args(member)
        right_length = isinstance(value, tuple) and len(value) == len(expected)
        return right_length and all(map(fits, value, expected))
    if member is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is member


def describe(kind: Any) -> str:
    """An option's type in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    parts: list[str] = []
    for member in alternatives(kind):
        if get_origin(member) is Literal:
            parts.append(", ".join(map(str, get_args(member))))
        elif get_origin(member) is tuple:
            parts.append("three integers")
        elif member is types.NoneType:
            parts.append("none")
        else:
            parts.append(words[member])
    return " or ".join(parts)
