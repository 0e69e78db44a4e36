"""Scalar functions that several kernels use.

Kernels compute in ``ACC``, a constexpr that is fp32 or fp64. No kernel takes a Python float: it
would arrive as fp32 from an eager call and as fp64 from a compiler. Constants of a model are
constexpr. Numbers that change from call to call are split into two fp32 parts, which together have
48 bits. An fp64 kernel reads both, an fp32 kernel reads the first.
"""

import struct

import triton.language as tl

from blip3o_kernels.typed import jit


def split(value: float) -> tuple[float, float]:
    """``value`` as the sum of two fp32 numbers, the first being ``value`` rounded."""
    high = _fp32(value)
    return high, _fp32(value - high)


def _fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@jit
def joined(high, low, ACC: tl.constexpr):
    """The number that ``split`` divided."""
    value = tl.cast(high, ACC)  # pyright: ignore[reportArgumentType]
    if tl.float64 == ACC:
        value += tl.cast(low, ACC)  # pyright: ignore[reportArgumentType]
    return value


@jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``. Where exp overflows to inf, the quotient is 0, which is its limit."""
    return 1.0 / (1.0 + tl.exp(-x))
