"""The double norm ``rms(rms(x; w1); w2) * (1 + scale) + shift`` of rows in registers.

Both norms add the same eps to their mean square. With gain = w1 w2 (1 + scale) and
square = w1^2 + eps, exactly:

    out = gain x r + shift        r = rsqrt(mean(square x^2) + eps^2)

One reduction replaces two. Backward, with m = r mean(gain dout x):

    dx = r gain dout - square x r^2 m

again after one reduction, of two sums. The gradients of the parameters need three sums over the
tokens of a sample, column by column,

    P = sum dout x r        Q = sum dout        R = sum m r^2 x^2

    dscale = w1 w2 P        dshift = Q
    dw2 = w1 sum_b (1 + scale) P        dw1 = sum_b ((1 + scale) w2 P - w1 R)

A branch that is scaled before its norm, ls y in place of x, has gain ls and square ls^2 in place of
gain and square, and then all holds for y: dx becomes dy, P and R are sums over y. dscale and dw2
gain a factor ls, dw1 = sum_b ((1 + scale) w2 ls P - w1 ls^2 R), and the scale itself receives
dls = sum_b (w1 w2 (1 + scale) P - (w1^2 + eps) ls R).
"""

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import unit_stride
from blip3o_kernels.pieces import (
    dot,
    parameter_piece,
    row_sum,
    row_sums,
    times,
)
from blip3o_kernels.typed import jit


@jit
def load_norm(
    w1,
    w2,
    scale,
    layer_scale,
    LAYER_SCALE: tl.constexpr,
    EPS: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``gain`` and ``square`` of one sample, with the layer scale if the branch has one."""
    gain = ()
    square = ()
    for k in tl.static_range(len(CUT)):
        w = parameter_piece(w1, k, CUT, WIDTH, ROWS, ACC, False)
        g = w * parameter_piece(w2, k, CUT, WIDTH, ROWS, ACC, False)
        g *= 1.0 + parameter_piece(scale, k, CUT, WIDTH, ROWS, ACC, False)
        s = tl.fma(w, w, tl.full(w.shape, EPS, ACC))
        if LAYER_SCALE:
            ls = parameter_piece(layer_scale, k, CUT, WIDTH, ROWS, ACC, False)
            g *= ls
            s *= ls * ls
        gain += (g,)
        square += (s,)
    return gain, square


@jit
def double_norm(x, gain, square, shift, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows, normed twice and modulated."""
    squares = row_sum(dot(times(square, x), x))
    r = tl.rsqrt(squares * (1.0 / WIDTH) + EPS * EPS)
    out = ()
    for k in tl.static_range(len(x)):
        out += (tl.fma(x[k] * r, gain[k], shift[k]),)
    return out


@jit
def gradient_factors(dout, x, gain, square, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """``r`` and ``m r^2`` of rows."""
    squares, products = row_sums(dot(times(square, x), x), dot(times(gain, dout), x))
    return factors(squares, products, EPS, WIDTH)


@jit
def factors(squares, products, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """``r`` and ``m r^2`` from ``sum(square x^2)`` and ``sum(gain dout x)``."""
    r = tl.rsqrt(squares * (1.0 / WIDTH) + EPS * EPS)
    return r, r * (products * (1.0 / WIDTH)) * r * r


@jit
def norm_gradient(dout, x, gain, square, r, pull):
    """``dx`` of a piece of rows."""
    return tl.fma(gain * dout, r, -(square * x) * pull)


class Modulation(NamedTuple):
    """The parameters of a double norm: weights ``[D]``, shift and scale ``[B, D]``."""

    w1: Tensor
    w2: Tensor
    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> "Modulation | None":
        """The four ``tensors`` with contiguous columns, or None where they are absent."""
        given = [unit_stride(u) for u in tensors if u is not None]
        return cls(*given) if given else None
