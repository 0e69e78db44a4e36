"""Triton's decorator, with the type that it has on the host, and its integer helpers.

Triton declares that ``jit`` returns the undecorated function. Its own helpers also take constexprs,
for which the host pays microseconds a call.
"""

from collections.abc import Callable
from typing import Any, cast

import triton

jit = cast(Callable[..., Any], triton.jit)
"""A kernel is launched with ``kernel[grid](*arguments, num_warps=...)``."""


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n`` and 1."""
    return 1 << max(n - 1, 0).bit_length()
