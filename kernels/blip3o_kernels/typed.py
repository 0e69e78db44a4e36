"""Triton's decorator and integer helpers, with the types that they have on the host.

Triton declares that ``jit`` returns the undecorated function, and that its integer helpers may
return a constexpr.
"""

from collections.abc import Callable
from typing import Any, cast

import triton

jit = cast(Callable[..., Any], triton.jit)
"""A kernel is launched with ``kernel[grid](*arguments, num_warps=...)``."""

cdiv = cast(Callable[[int, int], int], triton.cdiv)
next_power_of_2 = cast(Callable[[int], int], triton.next_power_of_2)
