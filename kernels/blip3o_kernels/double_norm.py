"""The double norm ``rms(rms(x; w1); w2) * (1 + scale) + shift`` of one row in registers.

Both norms add the same eps to their mean square. With a = w1 x, exactly:

    u = w2 a r      r = rsqrt(mean(a^2) + eps (mean(x^2) + eps))      out = u (1 + scale) + shift

One reduction, over x^2 and a^2 together, replaces two. Backward, with g = dout (1 + scale) w2 w1,
xhat = x r and m = mean(g xhat):

    dx = r (g - (w1^2 + eps) xhat m)

again after one reduction, over x^2, a^2 and g x. The gradients of the parameters need three sums
over the tokens of a sample, column by column,

    P = sum dout xhat        Q = sum dout        R = sum m xhat^2

    dscale = w1 w2 P         dshift = Q
    dw2 = w1 sum_b (1 + scale) P         dw1 = sum_b ((1 + scale) w2 P - w1 R)

A branch that is scaled before its norm, x = ls y, keeps P and R over y instead of x: dscale and dw2
gain a factor ls, dw1 = sum_b ((1 + scale) w2 ls P - w1 ls^2 R), and the scale itself receives
dls = sum_b (w1 w2 (1 + scale) P - (w1^2 + eps) ls R).
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import torch_accumulator, unit_stride
from blip3o_kernels.reduction import STAGE_COLUMNS, STAGE_ROWS, column_sums, sum2
from blip3o_kernels.tiles import load_vector
from blip3o_kernels.typed import cdiv, jit


@jit
def load_norm(w1, w2, shift, scale, sample, shift_b, scale_b, cols, inside, ACC: tl.constexpr):
    """w1, w2, shift and ``1 + scale`` of one sample."""
    return (
        load_vector(w1, cols, inside, ACC),
        load_vector(w2, cols, inside, ACC),
        load_vector(shift + sample * shift_b, cols, inside, ACC),
        1.0 + load_vector(scale + sample * scale_b, cols, inside, ACC),
    )


@jit
def double_norm(x, w1, w2, shift, one_plus_scale, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """One row, normed twice and modulated."""
    a = w1 * x
    squares_x, squares_a = sum2(x * x, a * a)
    r = tl.rsqrt(squares_a / WIDTH + EPS * (squares_x / WIDTH + EPS))
    return a * r * (w2 * one_plus_scale) + shift


@jit
def double_norm_gradient(dout, x, w1, gain, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """``dx``, ``r`` and ``m`` of one row, with ``gain = w1 w2 (1 + scale)``."""
    a = w1 * x
    g = dout * gain
    squares_x, squares_a = sum2(x * x, a * a)
    product = tl.sum(g * x, axis=0)
    r = tl.rsqrt(squares_a / WIDTH + EPS * (squares_x / WIDTH + EPS))
    m = r * product / WIDTH
    return r * (g - (w1 * w1 + EPS) * (x * r) * m), r, m


@jit
def store_partial_sums(partial, p, q, r, cols, inside, WIDTH: tl.constexpr):
    """Write the three sums of this program for the second stage."""
    target = partial + tl.program_id(0).to(tl.int64) * (3 * WIDTH) + cols
    tl.store(target, p, mask=inside)
    tl.store(target + WIDTH, q, mask=inside)
    tl.store(target + 2 * WIDTH, r, mask=inside)


@jit(do_not_specialize=["chunks"])
def _sample_sums_stage(
    partial,
    w1,
    w2,
    layer_scale,
    scale,
    dshift,
    dscale,
    sums,
    chunks,
    scale_b,
    width,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Second stage, per sample: dshift, dscale, and this sample's part of the weight gradients."""
    blocks = tl.cdiv(width, COLS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    inside = cols < width
    source = partial + sample * chunks * (3 * width)
    stride = 3 * width
    p = column_sums(source, cols, inside, chunks, stride, ROWS, COLS, ACC)
    q = column_sums(source + width, cols, inside, chunks, stride, ROWS, COLS, ACC)
    r = column_sums(source + 2 * width, cols, inside, chunks, stride, ROWS, COLS, ACC)
    weight = load_vector(w1, cols, inside, ACC) * load_vector(w2, cols, inside, ACC)
    if SCALED:
        weight = weight * load_vector(layer_scale, cols, inside, ACC)
    factor = 1.0 + load_vector(scale + sample * scale_b, cols, inside, ACC)
    row = sample * width + cols
    tl.store(dshift + row, q.to(dshift.dtype.element_ty), mask=inside)
    tl.store(dscale + row, (weight * p).to(dscale.dtype.element_ty), mask=inside)
    tl.store(sums + sample * (2 * width) + cols, factor * p, mask=inside)
    tl.store(sums + sample * (2 * width) + width + cols, r, mask=inside)


@jit(do_not_specialize=["samples"])
def _weight_gradient_stage(
    sums,
    w1,
    w2,
    layer_scale,
    dw1,
    dw2,
    dlayer_scale,
    samples,
    width,
    SCALED: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Third stage, over samples: dw1, dw2 and the gradient of the layer scale."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < width
    stride = 2 * width
    p = column_sums(sums, cols, inside, samples, stride, ROWS, COLS, ACC)
    r = column_sums(sums + width, cols, inside, samples, stride, ROWS, COLS, ACC)
    first, second = load_vector(w1, cols, inside, ACC), load_vector(w2, cols, inside, ACC)
    if SCALED:
        ls = load_vector(layer_scale, cols, inside, ACC)
        d = first * second * p - (first * first + EPS) * ls * r
        tl.store(dlayer_scale + cols, d.to(dlayer_scale.dtype.element_ty), mask=inside)
        p, r = ls * p, ls * ls * r
    d1 = second * p - first * r
    tl.store(dw1 + cols, d1.to(dw1.dtype.element_ty), mask=inside)
    tl.store(dw2 + cols, (first * p).to(dw2.dtype.element_ty), mask=inside)


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


def partial_sums(x: Tensor, acc: tl.dtype, programs: tuple[int, int], sums: int = 3) -> Tensor:
    """Empty memory for the sums of each program: ``[B, chunks, sums, D]``."""
    return x.new_empty((*programs, sums, x.shape[-1]), dtype=torch_accumulator(acc))


def parameter_gradients(
    partial: Tensor, norm: Modulation, layer_scale: Tensor | None, *, eps: float, acc: tl.dtype
) -> tuple[Modulation, Tensor | None]:
    """Gradients of a norm and of the layer scale before it, from partial sums."""
    samples, chunks, _, width = partial.shape
    gradient = Modulation(*(u.new_empty(u.shape) for u in norm))
    dls = None if layer_scale is None else layer_scale.new_empty(width)
    sums = partial.new_empty(samples, 2, width)
    blocks = cdiv(width, STAGE_COLUMNS)
    fixed = {"ROWS": STAGE_ROWS, "COLS": STAGE_COLUMNS, "ACC": acc, "SCALED": dls is not None}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    if samples:
        _sample_sums_stage[(samples * blocks,)](
            partial,
            norm.w1,
            norm.w2,
            layer_scale,
            norm.scale,
            gradient.shift,
            gradient.scale,
            sums,
            chunks,
            norm.scale.stride(0),
            width,
            **fixed,
            **options,
        )
    _weight_gradient_stage[(blocks,)](
        sums,
        norm.w1,
        norm.w2,
        layer_scale,
        gradient.w1,
        gradient.w2,
        dls,
        samples,
        width,
        EPS=eps,
        **fixed,
        **options,
    )
    return gradient, dls
