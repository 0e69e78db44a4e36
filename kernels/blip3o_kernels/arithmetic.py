"""Scalar pieces of several kernels.

Kernels compute in ``ACC``, fp32 or fp64, a constexpr. A Python float never reaches a kernel as it
is: it would arrive as fp32 from an eager call and as fp64 from a compiler. Constants of a model are
constexpr; numbers that change from call to call are split in two fp32 parts, which together hold 48
bits, so that an fp64 kernel loses nothing and an fp32 kernel reads the first part alone.
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
    """``1 / (1 + exp(-x))``; exp overflows to inf, and the quotient to its limit 0."""
    return 1.0 / (1.0 + tl.exp(-x))
