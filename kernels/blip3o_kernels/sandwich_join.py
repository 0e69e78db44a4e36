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
# pyright: reportAttributeAccessIssue=false

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
    load_norm,
    norm_gradient,
)
from blip3o_kernels.launch import (
    accumulator,
    blank,
    on_device,
    summed_launch,
    unit_stride,
    whole_waves,
)
from blip3o_kernels.norm_sums import ABSENT, parameter_gradients, partial_sums, sums_of
from blip3o_kernels.pieces import (
    add_products,
    deep_rows,
    dot,
    fetch_piece,
    fetch_rows,
    load_parameter,
    load_rows,
    row_sums,
    rows_of,
    store_piece,
    store_rows,
    store_sum,
    store_sums,
    times,
    widened,
    zeros,
)
from blip3o_kernels.quantise import quantised_like, store_quantised
from blip3o_kernels.tiles import token_range
from blip3o_kernels.typed import cdiv, jit

COLUMNS = 24
REGISTERS = 6.0
"""Columns of a thread, and registers for each: a warp holds a row of up to 768."""

BACKWARD_COLUMNS = 12
BACKWARD_DEPTH = 2
"""Columns, or rows of eight columns, of a thread with six sums a column."""


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
    partial,
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
    DEPTH: tl.constexpr,
    SUMS: tl.constexpr,
    ACC: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    step: tl.constexpr = DEPTH * ROWS
    stream_gradient, upstream, stream, branch = dx_out, dh, x_out, y + sample * y_b
    if STREAM:
        stream_gradient += sample * dx_out_b
    if PRE:
        upstream += sample * dh_b
        stream += sample * x_b
    row, inside = deep_rows(first, last, DEPTH, ROWS)
    next_d = ()
    next_g = ()
    next_u = ()
    next_v = ()
    if STREAM:
        next_d = fetch_rows(stream_gradient, row * dx_out_n, dx_out_d, inside, CUT, WIDTH)
    if PRE:
        next_g = fetch_rows(upstream, row * dh_n, dh_d, inside, CUT, WIDTH)
        next_u = fetch_rows(stream, row * x_n, x_d, inside, CUT, WIDTH)
    if LAYER_SCALE or POST:
        next_v = fetch_rows(branch, row * y_n, y_d, inside, CUT, WIDTH)
    if PRE:
        pre_factor = pre_scale + sample * pre_scale_b
        pre_gain, pre_square = load_norm(
            pre_w1, pre_w2, pre_factor, None, False, EPS, CUT, WIDTH, ROWS, ACC
        )
    if POST:
        post_factor = post_scale + sample * post_scale_b
        post_gain, post_square = load_norm(
            post_w1, post_w2, post_factor, layer_scale, LAYER_SCALE, EPS, CUT, WIDTH, ROWS, ACC
        )
    elif LAYER_SCALE:
        ls = load_parameter(layer_scale, CUT, WIDTH, ROWS, ACC)
    post_p = zeros(CUT, ROWS, ACC)
    post_q = zeros(CUT, ROWS, ACC)
    post_r = zeros(CUT, ROWS, ACC)
    pre_p = zeros(CUT, ROWS, ACC)
    pre_q = zeros(CUT, ROWS, ACC)
    pre_r = zeros(CUT, ROWS, ACC)
    for token in range(first, last, step):
        target, present = (sample * tokens + row) * WIDTH, inside
        # The next rows are on their way while these are computed; those that are needed late take
        # the registers that these leave.
        row, inside = deep_rows(token + step, last, DEPTH, ROWS)
        d, v = next_d, next_v
        next_d = ()
        next_v = ()
        if PRE:
            g, u = widened(next_g, ACC), widened(next_u, ACC)
            next_g = fetch_rows(upstream, row * dh_n, dh_d, inside, CUT, WIDTH)
            next_u = fetch_rows(stream, row * x_n, x_d, inside, CUT, WIDTH)
            squares, products = row_sums(dot(times(pre_square, u), u), dot(times(pre_gain, g), u))
            rms, pull = factors(squares, products, EPS, WIDTH)
        through = ()
        p = ()
        q = ()
        r = ()
        for k in tl.static_range(len(CUT)):
            if PRE:
                dk = norm_gradient(g[k], u[k], pre_gain[k], pre_square[k], rms, pull)
                if STREAM:
                    dk += d[k].to(ACC)
                if PARAMETERS:
                    p += (add_products(pre_p[k], g[k], u[k] * rms),)
                    q += (pre_q[k] + tl.sum(g[k], axis=0),)
                    r += (add_products(pre_r[k], u[k] * pull, u[k]),)
            elif STREAM:
                dk = d[k].to(ACC)
            else:
                dk = tl.zeros((DEPTH, ROWS, CUT[k][1]), ACC)
            store_piece(dx, target, dk, present, k, CUT, WIDTH)
            through += (dk,)
        if PRE and PARAMETERS:
            pre_p, pre_q, pre_r = p, q, r
        if LAYER_SCALE or POST:
            v = widened(v, ACC)
        if POST:
            squares, products = row_sums(
                dot(times(post_square, v), v), dot(times(post_gain, through), v)
            )
            rms, pull = factors(squares, products, EPS, WIDTH)
        p = ()
        q = ()
        r = ()
        for k in tl.static_range(len(CUT)):
            dk = through[k]
            if POST:
                out = norm_gradient(dk, v[k], post_gain[k], post_square[k], rms, pull)
                if PARAMETERS:
                    p += (add_products(post_p[k], dk, v[k] * rms),)
                    q += (post_q[k] + tl.sum(dk, axis=0),)
                    r += (add_products(post_r[k], v[k] * pull, v[k]),)
            elif LAYER_SCALE:
                out = dk * ls[k]
                if PARAMETERS:
                    p += (add_products(post_p[k], dk, v[k]),)
            else:
                out = dk
            store_piece(dy, target, out, present, k, CUT, WIDTH)
            if STREAM:
                next_d += (
                    fetch_piece(stream_gradient, row * dx_out_n, dx_out_d, inside, k, CUT, WIDTH),
                )
            if LAYER_SCALE or POST:
                next_v += (fetch_piece(branch, row * y_n, y_d, inside, k, CUT, WIDTH),)
        if PARAMETERS:
            if POST:
                post_p, post_q, post_r = p, q, r
            elif LAYER_SCALE:
                post_p = p
    if PARAMETERS:
        sums = partial + tl.program_id(0).to(tl.int64) * (SUMS * WIDTH)
        if POST:
            store_sums(sums, post_p, post_q, post_r, CUT, WIDTH)
        elif LAYER_SCALE:
            store_sum(sums, post_p, CUT, WIDTH)
        if PRE:
            store_sums(sums + (SUMS - 3) * WIDTH, pre_p, pre_q, pre_r, CUT, WIDTH)


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
    h, scales = x.new_empty(0) if norms[4] is None else blank(x), None
    if quantised:
        h, scales = quantised_like(x)
    samples, tokens, width = x.shape
    x_out = blank(x)
    ls, post, pre = _parameters(layer_scale, norms)
    launch, _ = whole_waves(x, COLUMNS, REGISTERS)
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
    dx, dy = blank(x_out), blank(y)
    acc = accumulator(x_out, y, ls, *(post or ()), *(pre or ()))
    launch, depth = summed_launch(x_out, BACKWARD_COLUMNS, BACKWARD_DEPTH)
    chunks = cdiv(tokens, launch.rows)
    dh = None if pre is None else dh  # that of an empty tensor
    found = pre if dh is not None else None
    sums = sums_of(ls, post, found) if parameters else 0
    partial = partial_sums(x_out, acc, (samples, chunks), sums) if sums else None
    dls = dpost = dpre = None
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
                partial,
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
                DEPTH=depth,
                SUMS=sums,
                ACC=acc,
                PARAMETERS=partial is not None,
                **launch.constants,
            )
        if partial is not None:
            dls, dpost, dpre = parameter_gradients(partial, ls, post, found, eps=eps, acc=acc)
    if parameters and pre is not None and dpre is None:
        dpre = Modulation(*(torch.zeros_like(u) for u in pre))
    results = (dls, *(dpost or ABSENT), *(dpre or ABSENT))
    return dx, dy, *(x_out.new_empty(0) if g is None else g for g in results)


def _parameters(
    layer_scale: Tensor | None, norms: Sequence[Tensor | None]
) -> tuple[Tensor | None, Modulation | None, Modulation | None]:
    ls = None if layer_scale is None else unit_stride(layer_scale)
    return ls, Modulation.of(norms[:4]), Modulation.of(norms[4:])
