"""Triton's decorator and integer helpers with the types that a launcher sees.

Triton gives ``jit`` a result that a type checker takes for the undecorated function, and its
integer helpers one that may be a constexpr.
"""

from collections.abc import Callable
from typing import Any, cast

import triton

jit = cast(Callable[..., Any], triton.jit)
"""A kernel is launched with ``kernel[grid](*arguments, num_warps=...)``."""

cdiv = cast(Callable[[int, int], int], triton.cdiv)
next_power_of_2 = cast(Callable[[int], int], triton.next_power_of_2)
