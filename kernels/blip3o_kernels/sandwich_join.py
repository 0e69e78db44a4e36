"""``x_out = x + norm(ls y; post)``, ``h = norm(x_out; pre)``: close one sub-layer, open the next.

``norm`` is the double norm of ``blip3o_kernels.double_norm``; ls is a layer scale ``[D]``. Each of
ls, post and pre may be absent. h is computed from x_out after rounding, because backward saves only
x_out and y and must see the same numbers.

Forward, per row: reads 2 D elements (x, y), writes 2 D (x_out, h). Separate ops would move 13 D.
Quantised, h is D bytes and a scale.
Backward, per row: reads 4 D (dx_out, dh, x_out, y), writes 2 D (dx, dy), and 6 D fp32 partial sums
per program; dx = dx_out + the gradient through pre, and dx drives the gradient through post.
Accumulates in fp32 (fp64 for fp64).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.double_norm import (
    Modulation,
    double_norm,
    double_norm_gradient,
    load_norm,
    parameter_gradients,
    partial_sums,
    store_partial_sums,
)
from blip3o_kernels.launch import (
    accumulator,
    backward_launch,
    forward_launch,
    on_device,
    register_limit,
    unit_stride,
)
from blip3o_kernels.quantise import quantised_like, store_quantised
from blip3o_kernels.reduction import column_sum
from blip3o_kernels.tiles import load_row, load_vector, token_range
from blip3o_kernels.typed import cdiv, jit

BACKWARD_PROGRAMS = 3
"""Programs of 4 warps that fit on a multiprocessor: 168 registers a thread; unbounded 198."""


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _forward_kernel(
    x,
    y,
    layer_scale,
    post_w1,
    post_w2,
    post_shift,
    post_scale,
    pre_w1,
    pre_w2,
    pre_shift,
    pre_scale,
    x_out,
    h_out,
    h_scales,
    tokens,
    rows,
    chunks,
    x_b,
    x_n,
    x_d,
    y_b,
    y_n,
    y_d,
    post_shift_b,
    post_scale_b,
    pre_shift_b,
    pre_scale_b,
    LAYER_SCALE: tl.constexpr,
    POST: tl.constexpr,
    PRE: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    if LAYER_SCALE:
        ls = load_vector(layer_scale, cols, inside, ACC)
    if POST:
        post_weight1, post_weight2, post_offset, post_factor = load_norm(
            post_w1,
            post_w2,
            post_shift,
            post_scale,
            sample,
            post_shift_b,
            post_scale_b,
            cols,
            inside,
            ACC,
        )
    if PRE:
        pre_weight1, pre_weight2, pre_offset, pre_factor = load_norm(
            pre_w1,
            pre_w2,
            pre_shift,
            pre_scale,
            sample,
            pre_shift_b,
            pre_scale_b,
            cols,
            inside,
            ACC,
        )
    for token in range(first, last):
        target = (sample * tokens + token) * WIDTH + cols
        stream = load_row(x + sample * x_b, token, cols, x_n, x_d, inside, ACC)
        branch = load_row(y + sample * y_b, token, cols, y_n, y_d, inside, ACC)
        if LAYER_SCALE:
            branch *= ls
        if POST:
            branch = double_norm(
                branch, post_weight1, post_weight2, post_offset, post_factor, EPS, WIDTH
            )
        stored = (stream + branch).to(x_out.dtype.element_ty)
        tl.store(x_out + target, stored, mask=inside)
        if PRE:
            h = double_norm(
                stored.to(ACC), pre_weight1, pre_weight2, pre_offset, pre_factor, EPS, WIDTH
            )
            if QUANTISED:
                row = sample * tokens + token
                store_quantised(h_out, h_scales, row, h, cols, inside, WIDTH)
            else:
                tl.store(h_out + target, h.to(h_out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _backward_kernel(
    dx_out,
    dh,
    x_out,
    y,
    layer_scale,
    post_w1,
    post_w2,
    post_scale,
    pre_w1,
    pre_w2,
    pre_scale,
    dx,
    dy,
    post_partial,
    pre_partial,
    tokens,
    rows,
    chunks,
    dx_out_b,
    dx_out_n,
    dx_out_d,
    dh_b,
    dh_n,
    dh_d,
    x_b,
    x_n,
    x_d,
    y_b,
    y_n,
    y_d,
    post_scale_b,
    pre_scale_b,
    STREAM: tl.constexpr,
    LAYER_SCALE: tl.constexpr,
    POST: tl.constexpr,
    PRE: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    if LAYER_SCALE:
        ls = load_vector(layer_scale, cols, inside, ACC)
    if POST:
        post_weight1 = load_vector(post_w1, cols, inside, ACC)
        post_gain = post_weight1 * load_vector(post_w2, cols, inside, ACC)
        post_gain *= 1.0 + load_vector(post_scale + sample * post_scale_b, cols, inside, ACC)
    if PRE:
        pre_weight1 = load_vector(pre_w1, cols, inside, ACC)
        pre_gain = pre_weight1 * load_vector(pre_w2, cols, inside, ACC)
        pre_gain *= 1.0 + load_vector(pre_scale + sample * pre_scale_b, cols, inside, ACC)
    post_p = tl.zeros((BLOCK,), ACC)
    post_q = tl.zeros((BLOCK,), ACC)
    post_r = tl.zeros((BLOCK,), ACC)
    pre_p = tl.zeros((BLOCK,), ACC)
    pre_q = tl.zeros((BLOCK,), ACC)
    pre_r = tl.zeros((BLOCK,), ACC)
    for token in range(first, last):
        target = (sample * tokens + token) * WIDTH + cols
        # All loads stand before the first sum, so that their latencies overlap.
        if STREAM:
            d = load_row(dx_out + sample * dx_out_b, token, cols, dx_out_n, dx_out_d, inside, ACC)
        else:
            d = tl.zeros((BLOCK,), ACC)
        if PRE:
            upstream = load_row(dh + sample * dh_b, token, cols, dh_n, dh_d, inside, ACC)
            stream = load_row(x_out + sample * x_b, token, cols, x_n, x_d, inside, ACC)
        if LAYER_SCALE or POST:
            row = load_row(y + sample * y_b, token, cols, y_n, y_d, inside, ACC)
        if PRE:
            through, inverse_rms, m = double_norm_gradient(
                upstream, stream, pre_weight1, pre_gain, EPS, WIDTH
            )
            d += through
            if PARAMETERS:
                unit = stream * inverse_rms
                pre_p += upstream * unit
                pre_q += upstream
                pre_r += m * unit * unit
        tl.store(dx + target, d.to(dx.dtype.element_ty), mask=inside)
        if LAYER_SCALE or POST:
            branch = row
            if LAYER_SCALE:
                branch = row * ls
            through = d
            unit = row
            if POST:
                through, inverse_rms, m = double_norm_gradient(
                    d, branch, post_weight1, post_gain, EPS, WIDTH
                )
                unit = row * inverse_rms
                if PARAMETERS:
                    post_q += d
                    post_r += m * unit * unit
            if PARAMETERS:
                post_p += d * unit
            if LAYER_SCALE:
                through *= ls
        else:
            through = d
        tl.store(dy + target, through.to(dy.dtype.element_ty), mask=inside)
    if PARAMETERS:
        if PRE:
            store_partial_sums(pre_partial, pre_p, pre_q, pre_r, cols, inside, WIDTH)
        if POST:
            store_partial_sums(post_partial, post_p, post_q, post_r, cols, inside, WIDTH)
        elif LAYER_SCALE:
            partial_row = post_partial + tl.program_id(0).to(tl.int64) * WIDTH
            tl.store(partial_row + cols, post_p, mask=inside)


def forward(
    x: Tensor, y: Tensor, layer_scale: Tensor | None, *norms_and_eps: Any
) -> tuple[Tensor, Tensor]:
    """``(x_out, h)``, each ``[B, N, D]``; h is empty without ``pre``.

    After ``layer_scale`` come the four tensors of post, the four of pre, and eps.
    """
    *norms, eps = norms_and_eps
    h = x.new_empty(0 if norms[4] is None else x.shape)
    return _forward(x, y, layer_scale, norms, h, None, eps), h


def forward_quantised(
    x: Tensor, y: Tensor, layer_scale: Tensor | None, *norms_and_eps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x_out, h, scales)``: h ``[B, N, D]`` in e4m3 with scales ``[B, N, 1]``, rounded once."""
    *norms, eps = norms_and_eps
    h, scales = quantised_like(x)
    return _forward(x, y, layer_scale, norms, h, scales, eps), h, scales


def _forward(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    norms: Sequence[Tensor | None],
    h: Tensor,
    scales: Tensor | None,
    eps: float,
) -> Tensor:
    """Write h and its scales where they are wanted; x_out."""
    samples, tokens, width = x.shape
    x_out = x.new_empty(x.shape)
    ls, post, pre = _parameters(layer_scale, norms)
    launch = forward_launch(width, samples * tokens)
    if not x.numel():
        return x_out
    chunks = cdiv(tokens, launch.rows)
    with on_device(x):
        _forward_kernel[(samples * chunks,)](
            x,
            y,
            ls,
            *(post or ABSENT),
            *(pre or ABSENT),
            x_out,
            h,
            scales,
            tokens,
            launch.rows,
            chunks,
            *x.stride(),
            *y.stride(),
            *((0, 0) if post is None else (post.shift.stride(0), post.scale.stride(0))),
            *((0, 0) if pre is None else (pre.shift.stride(0), pre.scale.stride(0))),
            LAYER_SCALE=ls is not None,
            POST=post is not None,
            PRE=pre is not None,
            EPS=eps,
            WIDTH=width,
            BLOCK=launch.block,
            ACC=accumulator(x, y, ls, *(post or ()), *(pre or ())),
            QUANTISED=scales is not None,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return x_out


def backward(
    dx_out: Tensor | None,
    dh: Tensor | None,
    x_out: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Gradients of x, y, layer_scale and the eight tensors of the norms.

    ``rest`` are those tensors, eps, and whether gradients of parameters are wanted: they are empty
    tensors if not, and where the parameter is absent. A gradient of None is zero.
    """
    *norms, eps, parameters = rest
    samples, tokens, width = x_out.shape
    ls, post, pre = _parameters(layer_scale, norms)
    dx, dy = x_out.new_empty(x_out.shape), y.new_empty(y.shape)
    acc = accumulator(x_out, y, ls, *(post or ()), *(pre or ()))
    launch = backward_launch(width, samples * tokens)
    chunks = cdiv(tokens, launch.rows)
    dh = None if pre is None else dh  # that of an empty tensor
    post_partial = pre_partial = None
    if parameters and (post is not None or ls is not None):
        post_partial = partial_sums(x_out, acc, (samples, chunks), 1 if post is None else 3)
    if parameters and dh is not None:
        pre_partial = partial_sums(x_out, acc, (samples, chunks))
    with on_device(x_out):
        if dx.numel():
            _backward_kernel[(samples * chunks,)](
                dx_out,
                dh,
                x_out,
                y,
                ls,
                *((None,) * 3 if post is None else (post.w1, post.w2, post.scale)),
                *((None,) * 3 if pre is None else (pre.w1, pre.w2, pre.scale)),
                dx,
                dy,
                post_partial,
                pre_partial,
                tokens,
                launch.rows,
                chunks,
                *((0, 0, 0) if dx_out is None else dx_out.stride()),
                *((0, 0, 0) if dh is None else dh.stride()),
                *x_out.stride(),
                *y.stride(),
                0 if post is None else post.scale.stride(0),
                0 if pre is None else pre.scale.stride(0),
                STREAM=dx_out is not None,
                LAYER_SCALE=ls is not None,
                POST=post is not None,
                PRE=dh is not None,
                EPS=eps,
                WIDTH=width,
                BLOCK=launch.block,
                ACC=acc,
                PARAMETERS=parameters,
                num_warps=launch.num_warps,
                maxnreg=register_limit(launch, BACKWARD_PROGRAMS),
                enable_fp_fusion=False,
            )
        dls = dpost = dpre = None
        if post_partial is not None and post is not None:
            dpost, dls = parameter_gradients(post_partial, post, ls, eps=eps, acc=acc)
        elif post_partial is not None and ls is not None:
            dls = ls.new_empty(width)
            column_sum(post_partial.view(-1, width), dls, acc)
        if pre_partial is not None and pre is not None:
            dpre, _ = parameter_gradients(pre_partial, pre, None, eps=eps, acc=acc)
        elif parameters and pre is not None:
            dpre = (torch.zeros_like(u) for u in pre)
    found = (dls, *(dpost or ABSENT), *(dpre or ABSENT))
    return dx, dy, *(x_out.new_empty(0) if g is None else g for g in found)


ABSENT = (None,) * 4


def _parameters(
    layer_scale: Tensor | None, norms: Sequence[Tensor | None]
) -> tuple[Tensor | None, Modulation | None, Modulation | None]:
    ls = None if layer_scale is None else unit_stride(layer_scale)
    return ls, Modulation.of(norms[:4]), Modulation.of(norms[4:])
