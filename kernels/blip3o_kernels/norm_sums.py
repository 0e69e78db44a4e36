"""The second stage of the gradients of a double norm: what its parameters receive.

One launch. Its first programs add the sums of all samples, for the weights; the others those of one
sample each, for shift and scale. See ``blip3o_kernels.double_norm`` for the formulas.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.double_norm import Modulation
from blip3o_kernels.reduction import STAGE_COLUMNS, STAGE_ROWS, STAGE_WARPS
from blip3o_kernels.tiles import load_vector
from blip3o_kernels.typed import cdiv, jit

SAMPLE_ROWS = 8
SAMPLE_COLUMNS = 512
"""Partial sums of one sample that a program reads at a time."""


@jit
def _sample_sums(
    partial,
    w1,
    w2,
    layer_scale,
    dshift,
    dscale,
    sample,
    first_column,
    chunks,
    width,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dshift and dscale of one sample."""
    cols = first_column + tl.arange(0, COLS)
    inside = cols < width
    rows = tl.arange(0, ROWS)[:, None]
    p = tl.zeros((ROWS, COLS), ACC)
    q = tl.zeros((ROWS, COLS), ACC)
    for first in range(0, chunks, ROWS):
        chunk = first + rows
        at = partial + (sample * chunks + chunk) * (3 * width) + cols[None, :]
        present = (chunk < chunks) & inside[None, :]
        p += tl.load(at, mask=present, other=0.0)
        q += tl.load(at + width, mask=present, other=0.0)
    weight = load_vector(w1, cols, inside, ACC) * load_vector(w2, cols, inside, ACC)
    if SCALED:
        weight = weight * load_vector(layer_scale, cols, inside, ACC)
    row = sample * width + cols
    tl.store(dshift + row, tl.sum(q, axis=0).to(dshift.dtype.element_ty), mask=inside)
    dscale_row = weight * tl.sum(p, axis=0)
    tl.store(dscale + row, dscale_row.to(dscale.dtype.element_ty), mask=inside)


@jit
def _weight_sums(
    partial,
    w1,
    w2,
    layer_scale,
    scale,
    dw1,
    dw2,
    dlayer_scale,
    first_column,
    samples,
    chunks,
    scale_b,
    width,
    SCALED: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """dw1, dw2 and the gradient of the layer scale, over all samples."""
    cols = first_column + tl.arange(0, COLS)
    inside = cols < width
    rows = tl.arange(0, ROWS)[:, None]
    p = tl.zeros((ROWS, COLS), ACC)
    r = tl.zeros((ROWS, COLS), ACC)
    for first in range(0, samples * chunks, ROWS):
        program = first + rows
        present = (program < samples * chunks) & inside[None, :]
        at = partial + program.to(tl.int64) * (3 * width) + cols[None, :]
        factor = scale + (program // chunks).to(tl.int64) * scale_b + cols[None, :]
        factor = 1.0 + tl.load(factor, mask=present, other=0.0).to(ACC)
        p += factor * tl.load(at, mask=present, other=0.0)
        r += tl.load(at + 2 * width, mask=present, other=0.0)
    p, r = tl.sum(p, axis=0), tl.sum(r, axis=0)
    first, second = load_vector(w1, cols, inside, ACC), load_vector(w2, cols, inside, ACC)
    if SCALED:
        ls = load_vector(layer_scale, cols, inside, ACC)
        d = first * second * p - (first * first + EPS) * ls * r
        tl.store(dlayer_scale + cols, d.to(dlayer_scale.dtype.element_ty), mask=inside)
        p, r = ls * p, ls * ls * r
    d1 = second * p - first * r
    tl.store(dw1 + cols, d1.to(dw1.dtype.element_ty), mask=inside)
    tl.store(dw2 + cols, (first * p).to(dw2.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["samples", "chunks"])
def _gradient_stage(
    partial,
    w1,
    w2,
    layer_scale,
    scale,
    dw1,
    dw2,
    dshift,
    dscale,
    dlayer_scale,
    samples,
    chunks,
    scale_b,
    width,
    SCALED: tl.constexpr,
    EPS: tl.constexpr,
    SAMPLE_ROWS: tl.constexpr,
    SAMPLE_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Second stage: first the programs of the weights, which read most, then those of samples."""
    program = tl.program_id(0)
    weights = tl.cdiv(width, COLS)
    if program < weights:
        _weight_sums(
            partial,
            w1,
            w2,
            layer_scale,
            scale,
            dw1,
            dw2,
            dlayer_scale,
            program * COLS,
            samples,
            chunks,
            scale_b,
            width,
            SCALED,
            EPS,
            ROWS,
            COLS,
            ACC,
        )
    else:
        blocks = tl.cdiv(width, SAMPLE_COLS)
        sample = ((program - weights) // blocks).to(tl.int64)
        _sample_sums(
            partial,
            w1,
            w2,
            layer_scale,
            dshift,
            dscale,
            sample,
            (program - weights) % blocks * SAMPLE_COLS,
            chunks,
            width,
            SCALED,
            SAMPLE_ROWS,
            SAMPLE_COLS,
            ACC,
        )


def parameter_gradients(
    partial: Tensor, norm: Modulation, layer_scale: Tensor | None, *, eps: float, acc: tl.dtype
) -> tuple[Modulation, Tensor | None]:
    """Gradients of a norm and of the layer scale before it, from partial sums."""
    samples, chunks, _, width = partial.shape
    gradient = Modulation(*(u.new_empty(u.shape) for u in norm))
    dls = None if layer_scale is None else layer_scale.new_empty(width)
    grid = cdiv(width, STAGE_COLUMNS) + samples * cdiv(width, SAMPLE_COLUMNS)
    _gradient_stage[(grid,)](
        partial,
        norm.w1,
        norm.w2,
        layer_scale,
        norm.scale,
        gradient.w1,
        gradient.w2,
        gradient.shift,
        gradient.scale,
        dls,
        samples,
        chunks,
        norm.scale.stride(0),
        width,
        SCALED=dls is not None,
        EPS=eps,
        SAMPLE_ROWS=SAMPLE_ROWS,
        SAMPLE_COLS=SAMPLE_COLUMNS,
        ROWS=STAGE_ROWS,
        COLS=STAGE_COLUMNS,
        ACC=acc,
        num_warps=STAGE_WARPS,
        enable_fp_fusion=False,
    )
    return gradient, dls
