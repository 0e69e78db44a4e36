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
def gelu(u, ROUGH: tl.constexpr):
    """``u Phi(u)``, exact up to the error of ``mills_ratio`` (arXiv:1606.08415)."""
    if u.dtype == tl.float64:
        tail = _tail(u)
    else:
        ratio, bell = mills_ratio(u, ROUGH)
        tail = bell * ratio
    # Subtracted from u or from 0, so that a small result keeps its digits.
    return tl.fma(tl.abs(u), -tail, tl.maximum(u, 0.0, tl.PropagateNan.ALL))


@jit
def gelu_slope(u, ROUGH: tl.constexpr):
    """``Phi(u) + u phi(u)``, the derivative of ``gelu``; that at ``-u`` is one less that at u."""
    if u.dtype == tl.float64:
        below = tl.fma(tl.abs(u), -0.3989422804014327 * tl.exp(-0.5 * u * u), _tail(u))
    else:
        ratio, bell = mills_ratio(u, ROUGH)
        below = bell * tl.fma(tl.abs(u), -0.3989422804014327, ratio)
    return tl.where(u < 0.0, below, 1.0 - below)


@jit
def mills_ratio(u, ROUGH: tl.constexpr):
    """``P(N > |u|) / bell`` of a standard normal N, and ``bell = exp(-u^2 / 2)``, in fp32.

    The ratio is a polynomial in ``s = (1 + c |u|)^(-1/2)``, or in its square, up to |u| = 13.5,
    beyond which bell is 0. It is fitted to a relative error of 8.5e-8, or with ``ROUGH`` of 1.1e-5,
    a fortieth of what rounding to fp16 costs. Fp32 rounding adds about 1e-6, in the far tail 1e-7
    u^2. Unlike ``(1 - erf) / 2`` the product keeps its digits in the tail.
    """
    bell = tl.exp2((u * u) * -0.7213475204444817)
    s = tl.rsqrt(tl.fma(tl.abs(u), 0.435 if ROUGH else 0.3, 1.0))
    if ROUGH:
        q = tl.fma(s, -1.365903598081454, 4.655090674452828)
        q = tl.fma(s, q, -5.634685577665488)
        q = tl.fma(s, q, 3.834900650602958)
        q = tl.fma(s, q, -1.2459844632437536)
        q = tl.fma(s, q, 0.2794090641645246)
        q = tl.fma(s, q, -0.022832092437412667)
    else:
        # The square of a reciprocal root takes two instructions, a division eight.
        t = s * s
        q = tl.fma(t, 0.03674611194674413, -0.16169825168964025)
        q = tl.fma(t, q, 0.21416568153409027)
        q = tl.fma(t, q, -0.06095035905827292)
        q = tl.fma(t, q, 0.13245645905656636)
        q = tl.fma(t, q, 0.09871420510355954)
        q = tl.fma(t, q, 0.12094989483816534)
        q = tl.fma(t, q, 0.11961621796181865)
        q *= t
    return q, bell


@jit
def _tail(u):
    """``P(N > |u|)`` in fp64."""
    return 0.5 * (1.0 - tl.erf(tl.abs(u) * 0.7071067811865476))
