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

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.double_norm import (
    Modulation,
    double_norm,
    factors,
    gradient_factors,
    keep_norm,
    load_norm,
    norm_gradient,
    norm_piece,
    partial_sums,
    store_partial_sums,
)
from blip3o_kernels.launch import (
    accumulator,
    backward_launch,
    forward_launch,
    on_device,
    unit_stride,
)
from blip3o_kernels.norm_sums import parameter_gradients
from blip3o_kernels.pieces import (
    dot,
    load_parameter,
    load_piece,
    load_rows,
    parameter_piece,
    row_sum,
    rows_of,
    store_piece,
    store_rows,
    store_sum,
    times,
    zeros,
)
from blip3o_kernels.quantise import quantised_like, store_quantised
from blip3o_kernels.reduction import column_sum
from blip3o_kernels.tiles import token_range
from blip3o_kernels.typed import cdiv, jit

COLUMNS = 24
"""Columns of a thread: a warp holds a row of up to 768."""

BACKWARD_COLUMNS = 16
BACKWARD_REGISTERS = 6.8
"""For a column: six sums and what comes and goes. The four inputs of 16 bits add two."""


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
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    if POST:
        post_factor = post_scale + sample * post_scale_b
        post_gain, post_square = load_norm(
            post_w1, post_w2, post_factor, layer_scale, LAYER_SCALE, EPS, CUT, WIDTH, ROWS, ACC
        )
        post_offset = load_parameter(post_shift + sample * post_shift_b, CUT, WIDTH, ROWS, ACC)
    elif LAYER_SCALE:
        ls = load_parameter(layer_scale, CUT, WIDTH, ROWS, ACC)
    if PRE:
        pre_factor = pre_scale + sample * pre_scale_b
        pre_gain, pre_square = load_norm(
            pre_w1, pre_w2, pre_factor, None, False, EPS, CUT, WIDTH, ROWS, ACC
        )
        pre_offset = load_parameter(pre_shift + sample * pre_shift_b, CUT, WIDTH, ROWS, ACC)
    for token in range(first, last, ROWS):
        row, inside = rows_of(token, last, ROWS)
        target = sample * tokens + row
        stream = load_rows(x + sample * x_b, row * x_n, x_d, inside, CUT, WIDTH, ACC)
        branch = load_rows(y + sample * y_b, row * y_n, y_d, inside, CUT, WIDTH, ACC)
        if POST:
            branch = double_norm(branch, post_gain, post_square, post_offset, EPS, WIDTH)
        elif LAYER_SCALE:
            branch = times(branch, ls)
        stored = ()
        for k in tl.static_range(len(CUT)):
            stored += ((stream[k] + branch[k]).to(x_out.dtype.element_ty),)
        store_rows(x_out, target * WIDTH, stored, inside, CUT, WIDTH)
        if PRE:
            rounded = ()
            for k in tl.static_range(len(CUT)):
                rounded += (stored[k].to(ACC),)  # pyright: ignore[reportAttributeAccessIssue]
            h = double_norm(rounded, pre_gain, pre_square, pre_offset, EPS, WIDTH)
            if QUANTISED:
                store_quantised(h_out, h_scales, target, h, inside, CUT, WIDTH)
            else:
                store_rows(h_out, target * WIDTH, h, inside, CUT, WIDTH)


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
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    stream_gradient, upstream = dx_out, dh
    if STREAM:
        stream_gradient += sample * dx_out_b
    pre_kept, pre_gain, pre_square = pre_partial, (), ()
    post_kept, post_gain, post_square = post_partial, (), ()
    if PRE:
        upstream += sample * dh_b
        pre_factor = pre_scale + sample * pre_scale_b
        pre_gain, pre_square = load_norm(
            pre_w1, pre_w2, pre_factor, None, False, EPS, CUT, WIDTH, ROWS, ACC
        )
        if PARAMETERS:
            pre_kept = keep_norm(pre_partial, pre_gain, pre_square, CUT, WIDTH, ROWS)
    if POST:
        post_factor = post_scale + sample * post_scale_b
        post_gain, post_square = load_norm(
            post_w1, post_w2, post_factor, layer_scale, LAYER_SCALE, EPS, CUT, WIDTH, ROWS, ACC
        )
        if PARAMETERS:
            post_kept = keep_norm(post_partial, post_gain, post_square, CUT, WIDTH, ROWS)
    stream, branch = x_out + sample * x_b, y + sample * y_b
    post_p = zeros(CUT, ROWS, ACC)
    post_q = zeros(CUT, ROWS, ACC)
    post_r = zeros(CUT, ROWS, ACC)
    pre_p = zeros(CUT, ROWS, ACC)
    pre_q = zeros(CUT, ROWS, ACC)
    pre_r = zeros(CUT, ROWS, ACC)
    for token in range(first, last, ROWS):
        row, inside = rows_of(token, last, ROWS)
        target = (sample * tokens + row) * WIDTH
        # All rows are read before the first sum, so that their latencies overlap.
        if STREAM:
            d = load_rows(stream_gradient, row * dx_out_n, dx_out_d, inside, CUT, WIDTH, ACC)
        else:
            d = zeros(CUT, ROWS, ACC)
        if LAYER_SCALE or POST:
            v = load_rows(branch, row * y_n, y_d, inside, CUT, WIDTH, ACC)
        if PRE:
            g = load_rows(upstream, row * dh_n, dh_d, inside, CUT, WIDTH, ACC)
            u = load_rows(stream, row * x_n, x_d, inside, CUT, WIDTH, ACC)
        if POST:
            # The first sum over y needs no gradient: so y need not stay in registers.
            scaled = ()
            for k in tl.static_range(len(CUT)):
                _, square_k = norm_piece(
                    post_kept, post_gain, post_square, k, CUT, WIDTH, ROWS, ACC, PARAMETERS, False
                )
                scaled += (square_k * v[k],)
            post_squares = row_sum(dot(scaled, v))
        if PRE:
            rms, pull = gradient_factors(
                g, u, pre_kept, pre_gain, pre_square, EPS, CUT, WIDTH, ROWS, ACC, PARAMETERS
            )
        through = ()
        p = ()
        q = ()
        r = ()
        for k in tl.static_range(len(CUT)):
            dk = d[k]
            if PRE:
                # Read again, a piece at a time: the sums need the registers.
                gk = load_piece(upstream, row * dh_n, dh_d, inside, k, CUT, WIDTH, ACC, True)
                vk = load_piece(stream, row * x_n, x_d, inside, k, CUT, WIDTH, ACC, True)
                gain_k, square_k = norm_piece(
                    pre_kept, pre_gain, pre_square, k, CUT, WIDTH, ROWS, ACC, PARAMETERS, True
                )
                dk += norm_gradient(gk, vk, gain_k, square_k, rms, pull)
                if PARAMETERS:
                    p += (tl.fma(gk, vk * rms, pre_p[k]),)
                    q += (pre_q[k] + gk,)
                    r += (tl.fma(vk * pull, vk, pre_r[k]),)
            store_piece(dx, target, dk, inside, k, CUT, WIDTH)
            through += (dk,)
        if PRE and PARAMETERS:
            pre_p, pre_q, pre_r = p, q, r
        if POST:
            v = ()
            scaled = ()
            for k in tl.static_range(len(CUT)):
                v += (load_piece(branch, row * y_n, y_d, inside, k, CUT, WIDTH, ACC, True),)
                gain_k, _ = norm_piece(
                    post_kept, post_gain, post_square, k, CUT, WIDTH, ROWS, ACC, PARAMETERS, False
                )
                scaled += (gain_k * through[k],)
            rms, pull = factors(post_squares, row_sum(dot(scaled, v)), EPS, WIDTH)
        p = ()
        q = ()
        r = ()
        for k in tl.static_range(len(CUT)):
            dk = through[k]
            if POST:
                gain_k, square_k = norm_piece(
                    post_kept, post_gain, post_square, k, CUT, WIDTH, ROWS, ACC, PARAMETERS, True
                )
                out = norm_gradient(dk, v[k], gain_k, square_k, rms, pull)
                if PARAMETERS:
                    p += (tl.fma(dk, v[k] * rms, post_p[k]),)
                    q += (post_q[k] + dk,)
                    r += (tl.fma(v[k] * pull, v[k], post_r[k]),)
            elif LAYER_SCALE:
                out = dk * parameter_piece(layer_scale, k, CUT, WIDTH, ROWS, ACC, True)
                if PARAMETERS:
                    p += (tl.fma(dk, v[k], post_p[k]),)
            else:
                out = dk
            store_piece(dy, target, out, inside, k, CUT, WIDTH)
        if PARAMETERS:
            if POST:
                post_p, post_q, post_r = p, q, r
            elif LAYER_SCALE:
                post_p = p
    if PARAMETERS:
        if PRE:
            store_partial_sums(pre_partial, pre_p, pre_q, pre_r, CUT, WIDTH)
        if POST:
            store_partial_sums(post_partial, post_p, post_q, post_r, CUT, WIDTH)
        elif LAYER_SCALE:
            store_sum(post_partial + tl.program_id(0).to(tl.int64) * WIDTH, post_p, CUT, WIDTH)


def forward(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    *norms_and_eps: Any,
    quantised: bool = False,
) -> tuple[Tensor, ...]:
    """``(x_out, h)``, each ``[B, N, D]``; h is empty without ``pre``.

    After ``layer_scale`` come the four tensors of post, the four of pre, and eps. Quantised, h is
    in e4m3, rounded once, and its scales ``[B, N, 1]`` follow.
    """
    *norms, eps = norms_and_eps
    h, scales = x.new_empty(0 if norms[4] is None else x.shape), None
    if quantised:
        h, scales = quantised_like(x)
    samples, tokens, width = x.shape
    x_out = x.new_empty(x.shape)
    ls, post, pre = _parameters(layer_scale, norms)
    launch = forward_launch(width, samples * tokens, COLUMNS)
    chunks = cdiv(tokens, launch.rows)
    with on_device(x):
        if x.numel():
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
                ACC=accumulator(x, y, ls, *(post or ()), *(pre or ())),
                QUANTISED=scales is not None,
                **launch.constants,
            )
    return (x_out, h) if scales is None else (x_out, h, scales)


forward_quantised = partial(forward, quantised=True)


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
    per_column = BACKWARD_REGISTERS + x_out.element_size()
    columns = BACKWARD_COLUMNS if parameters else COLUMNS
    launch, registers = backward_launch(width, samples, tokens, columns, per_column)
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
                ACC=acc,
                PARAMETERS=parameters,
                maxnreg=registers,
                **launch.constants,
            )
        dls = dpost = dpre = None
        if post_partial is not None and post is not None:
            dpost, dls = parameter_gradients(post_partial, post, ls, eps=eps, acc=acc)
        elif post_partial is not None and ls is not None:
            dls = ls.new_empty(width)
            column_sum(post_partial.view(-1, 1, width), (dls,), acc)
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
