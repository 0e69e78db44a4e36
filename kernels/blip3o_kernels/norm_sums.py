"""The gradients of the parameters of double norms, from the sums of the programs of a first stage.

A first stage writes P, Q and R of ``blip3o_kernels.double_norm`` for each norm, or only P for a
layer scale without a norm. One launch adds them for all norms of an op: a program has a few columns
of the sums of all programs. It adds those of each sample, for shift and scale, and then the
samples, for the weights. So each sum is read once.
"""

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false

import triton.language as tl
from torch import Tensor

from blip3o_kernels.double_norm import Modulation
from blip3o_kernels.launch import blank, torch_accumulator
from blip3o_kernels.pieces import add_three, add_two
from blip3o_kernels.tiles import load_vector
from blip3o_kernels.typed import cdiv, jit, next_power_of_2

ABSENT = (None,) * 4
"""The tensors of a missing norm."""

STAGE_PROGRAMS = 128
STAGE_COLUMNS = 8
STAGE_WARPS = 8
"""What a program reads at a time: a sector of each of 128 programs, 4 KB of each kind of sum."""
STAGE_REGISTERS = 128
"""Of a thread; by itself the assembler takes 64 for some variants, and spills."""


@jit
def _load_sums(at, present, width, SUMS: tl.constexpr):
    """The next ``SUMS`` rows of each program, ``[SAMPLES, CHUNKS, COLS]``."""
    sums = ()
    for i in tl.static_range(SUMS):
        sums += (tl.load(at + i * width, mask=present, other=0.0),)
    return sums


@jit
def _load_factor(scale, row, stride, col, inside, ACC: tl.constexpr):
    """``1 + scale`` of some samples."""
    return 1.0 + tl.load(scale + row * stride + col, mask=inside, other=0.0).to(ACC)


@jit
def _sample_gradients(sums, factor, weight, dshift, dscale, target, inside):
    """Write the gradients of shift and scale; returns ``(1 + scale) P`` and R of each sample."""
    p, q, r = tl.reduce(sums, 1, add_three)
    tl.store(dshift + target, q.to(dshift.dtype.element_ty), mask=inside)
    tl.store(dscale + target, (weight[None, :] * p).to(dscale.dtype.element_ty), mask=inside)
    return factor * p, r


@jit
def _store_weights(dw1, dw2, w1, w2, p, r, cols, within):
    """Write the gradients of w1 and w2."""
    tl.store(dw1 + cols, (w2 * p - w1 * r).to(dw1.dtype.element_ty), mask=within)
    tl.store(dw2 + cols, (w1 * p).to(dw2.dtype.element_ty), mask=within)


@jit(do_not_specialize=["samples", "chunks"])
def _gradient_stage(
    partial,
    layer_scale,
    dlayer_scale,
    post_w1,
    post_w2,
    post_scale,
    post_dw1,
    post_dw2,
    post_dshift,
    post_dscale,
    pre_w1,
    pre_w2,
    pre_scale,
    pre_dw1,
    pre_dw2,
    pre_dshift,
    pre_dscale,
    samples,
    chunks,
    width,
    post_scale_b,
    pre_scale_b,
    SCALED: tl.constexpr,
    POST: tl.constexpr,
    PRE: tl.constexpr,
    EPS: tl.constexpr,
    SAMPLES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    post_sums: tl.constexpr = 3 if POST else 1 if SCALED else 0
    pre_sums: tl.constexpr = 3 if PRE else 0
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    within = cols < width
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    ls = tl.zeros((COLS,), ACC)
    post_w, post_u = ls, ls
    pre_w, pre_u = ls, ls
    post_p = tl.zeros((SAMPLES, COLS), ACC)
    post_r, pre_p, pre_r = post_p, post_p, post_p
    for first in range(0, samples, SAMPLES):
        # All is read before the first sum, so that latencies overlap.
        sample = first + tl.arange(0, SAMPLES)
        program = sample[:, None, None].to(tl.int64) * chunks + chunk
        at = partial + program * ((post_sums + pre_sums) * width) + cols[None, None, :]
        present = (sample < samples)[:, None, None] & (chunk < chunks) & within[None, None, :]
        post = _load_sums(at, present, width, post_sums)
        pre = _load_sums(at + post_sums * width, present, width, pre_sums)
        row, col = sample[:, None].to(tl.int64), cols[None, :]
        inside = (row < samples) & within[None, :]
        if SCALED:
            ls = load_vector(layer_scale, cols, within, ACC)
        if POST:
            post_factor = _load_factor(post_scale, row, post_scale_b, col, inside, ACC)
            post_w = load_vector(post_w1, cols, within, ACC)
            post_u = load_vector(post_w2, cols, within, ACC)
        if PRE:
            pre_factor = _load_factor(pre_scale, row, pre_scale_b, col, inside, ACC)
            pre_w = load_vector(pre_w1, cols, within, ACC)
            pre_u = load_vector(pre_w2, cols, within, ACC)
        target = row * width + col
        if POST:
            weight = post_w * post_u
            if SCALED:
                weight *= ls
            p, r = _sample_gradients(
                post, post_factor, weight, post_dshift, post_dscale, target, inside
            )
            post_p += p
            post_r += r
        elif SCALED:
            post_p += tl.sum(post[0], axis=1)
        if PRE:
            p, r = _sample_gradients(
                pre, pre_factor, pre_w * pre_u, pre_dshift, pre_dscale, target, inside
            )
            pre_p += p
            pre_r += r
    if SCALED or POST:
        p, r = tl.reduce((post_p, post_r), 0, add_two)
        if POST:
            d = post_w * post_u * p - (post_w * post_w + EPS) * ls * r
            if SCALED:
                p, r = ls * p, ls * ls * r
            _store_weights(post_dw1, post_dw2, post_w, post_u, p, r, cols, within)
        else:
            d = p
        if SCALED:
            tl.store(dlayer_scale + cols, d.to(dlayer_scale.dtype.element_ty), mask=within)
    if PRE:
        p, r = tl.reduce((pre_p, pre_r), 0, add_two)
        _store_weights(pre_dw1, pre_dw2, pre_w, pre_u, p, r, cols, within)


def sums_of(layer_scale: Tensor | None, post: Modulation | None, pre: Modulation | None) -> int:
    """How many sums a column a program of the first stage writes: those of post, then of pre."""
    of_post = 3 if post is not None else 1 if layer_scale is not None else 0
    return of_post + (0 if pre is None else 3)


def partial_sums(x: Tensor, acc: tl.dtype, programs: tuple[int, int], sums: int) -> Tensor:
    """Empty memory for the sums of each program: ``[B, chunks, sums, D]``."""
    return x.new_empty((*programs, sums, x.shape[-1]), dtype=torch_accumulator(acc))


def parameter_gradients(
    partial: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation | None,
    *,
    eps: float,
    acc: tl.dtype,
) -> tuple[Tensor | None, Modulation | None, Modulation | None]:
    """Gradients of a layer scale, of the norm after it and of another norm; None where absent."""
    samples, chunks, _, width = partial.shape
    dls = None if layer_scale is None else layer_scale.new_empty(width)
    dpost, dpre = (
        None if norm is None else Modulation(*(blank(u) for u in norm)) for norm in (post, pre)
    )
    chunks_block = next_power_of_2(max(1, chunks))  # an empty batch has none
    _gradient_stage[(cdiv(width, STAGE_COLUMNS),)](
        partial,
        layer_scale,
        dls,
        *((None,) * 3 if post is None else (post.w1, post.w2, post.scale)),
        *(dpost or ABSENT),
        *((None,) * 3 if pre is None else (pre.w1, pre.w2, pre.scale)),
        *(dpre or ABSENT),
        samples,
        chunks,
        width,
        0 if post is None else post.scale.stride(0),
        0 if pre is None else pre.scale.stride(0),
        SCALED=dls is not None,
        POST=post is not None,
        PRE=pre is not None,
        EPS=eps,
        SAMPLES=max(1, STAGE_PROGRAMS // chunks_block),
        CHUNKS=chunks_block,
        COLS=STAGE_COLUMNS,
        ACC=acc,
        num_warps=STAGE_WARPS,
        maxnreg=STAGE_REGISTERS,
        enable_fp_fusion=False,
    )
    return dls, dpost, dpre
