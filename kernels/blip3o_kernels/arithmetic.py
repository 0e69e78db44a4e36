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


@jit
def normal_tail(u, ROUGH: tl.constexpr):
    """``P(N > |u|)`` of a standard normal variable, and its density at ``u``.

    In fp32, with one exponential for both: ``P = exp(-u^2 / 2) t q(t)``, ``t = 1 / (1 + c |u|)``
    and q a polynomial, fitted to a relative error of 8.5e-8 at any u, or with ``ROUGH`` of 5e-6, a
    fiftieth of what rounding to 16 bits costs. Fp32 rounding adds about 1e-6, in the far tail
    1e-7 u^2. Unlike ``(1 - erf) / 2`` it keeps its digits in the tail.
    """
    if u.dtype == tl.float64:
        tail = 0.5 * (1.0 - tl.erf(tl.abs(u) * 0.7071067811865476))
        bell = tl.exp(-0.5 * u * u)
    else:
        bell = tl.exp2((u * u) * -0.7213475204444817)
        # The square of a reciprocal root takes two instructions, a division eight.
        t = tl.rsqrt(tl.fma(tl.abs(u), 0.31 if ROUGH else 0.3, 1.0))
        t *= t
        if ROUGH:
            q = tl.fma(t, -0.07393008342715292, 0.18044909568854872)
            q = tl.fma(t, q, 0.015751738795005785)
            q = tl.fma(t, q, 0.133422286571968)
            q = tl.fma(t, q, 0.120444346535169)
            q = tl.fma(t, q, 0.1238602722741552)
        else:
            q = tl.fma(t, 0.03674611194674413, -0.16169825168964025)
            q = tl.fma(t, q, 0.21416568153409027)
            q = tl.fma(t, q, -0.06095035905827292)
            q = tl.fma(t, q, 0.13245645905656636)
            q = tl.fma(t, q, 0.09871420510355954)
            q = tl.fma(t, q, 0.12094989483816534)
            q = tl.fma(t, q, 0.11961621796181865)
        tail = bell * (t * q)
    return tail, 0.3989422804014327 * bell
