"""``h = rms(rms(x; w1); w2) * (1 + scale) + shift``: RMSNorm and AdaLN (arXiv:2212.09748) in one.

The mathematics is in ``blip3o_kernels.double_norm``. x is ``[B, N, D]``, w1 and w2 ``[D]``, shift
and scale ``[B, D]``.

Forward, per row: reads D elements, writes D. A program reads the parameters once for all its rows.
Quantised, it writes D bytes and a scale. Backward, per row: reads 2 D (dout, x), writes D, and 3 D
fp32 partial sums per program. Only the inputs are saved. Accumulates in fp32 (fp64 for fp64).
"""

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from functools import partial

import triton.language as tl
from torch import Tensor

from blip3o_kernels.double_norm import (
    Modulation,
    double_norm,
    gradient_factors,
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
from blip3o_kernels.norm_sums import parameter_gradients, partial_sums
from blip3o_kernels.pieces import (
    add_products,
    deep_rows,
    fetch_piece,
    fetch_rows,
    load_parameter,
    load_rows,
    rows_of,
    store_piece,
    store_rows,
    store_sums,
    widened,
    zeros,
)
from blip3o_kernels.quantise import quantised_like, store_quantised
from blip3o_kernels.tiles import token_range
from blip3o_kernels.typed import cdiv, jit

COLUMNS = 32
REGISTERS = 2.8
"""Columns of a thread, and registers for each: a warp holds a row of up to 1,024."""

BACKWARD_COLUMNS = 24
BACKWARD_DEPTH = 4
"""Columns, or rows of eight columns, of a thread with three sums a column."""


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _forward_kernel(
    x,
    w1,
    w2,
    shift,
    scale,
    out,
    out_scales,
    tokens,
    rows,
    chunks,
    x_b,
    x_n,
    x_d,
    shift_b,
    scale_b,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    factor = scale + sample * scale_b
    gain, square = load_norm(w1, w2, factor, None, False, EPS, CUT, WIDTH, ROWS, ACC)
    offset = load_parameter(shift + sample * shift_b, CUT, WIDTH, ROWS, ACC)
    for token in range(first, last, ROWS):
        row, inside = rows_of(token, last, ROWS)
        values = load_rows(x + sample * x_b, row * x_n, x_d, inside, CUT, WIDTH, ACC)
        h = double_norm(values, gain, square, offset, EPS, WIDTH)
        target = sample * tokens + row
        if QUANTISED:
            store_quantised(out, out_scales, target, h, inside, CUT, WIDTH)
        else:
            store_rows(out, target * WIDTH, h, inside, CUT, WIDTH)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _backward_kernel(
    dout,
    x,
    w1,
    w2,
    scale,
    dx,
    partial,
    tokens,
    rows,
    chunks,
    dout_b,
    dout_n,
    dout_d,
    x_b,
    x_n,
    x_d,
    scale_b,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    DEPTH: tl.constexpr,
    EARLY: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    up, source = dout + sample * dout_b, x + sample * x_b
    row, inside = deep_rows(first, last, DEPTH, ROWS)
    next_g = fetch_rows(up, row * dout_n, dout_d, inside, CUT, WIDTH)
    next_v = fetch_rows(source, row * x_n, x_d, inside, CUT, WIDTH)
    factor = scale + sample * scale_b
    gain, square = load_norm(w1, w2, factor, None, False, EPS, CUT, WIDTH, ROWS, ACC)
    p = zeros(CUT, ROWS, ACC)
    q = zeros(CUT, ROWS, ACC)
    r = zeros(CUT, ROWS, ACC)
    for token in range(first, last, DEPTH * ROWS):
        g, v = widened(next_g, ACC), widened(next_v, ACC)
        target, present = (sample * tokens + row) * WIDTH, inside
        # The next rows are on their way while these are computed.
        row, inside = deep_rows(token + DEPTH * ROWS, last, DEPTH, ROWS)
        next_g = ()
        next_v = ()
        if EARLY:
            next_g = fetch_rows(up, row * dout_n, dout_d, inside, CUT, WIDTH)
            next_v = fetch_rows(source, row * x_n, x_d, inside, CUT, WIDTH)
        rms, pull = gradient_factors(g, v, gain, square, EPS, WIDTH)
        new_p = ()
        new_q = ()
        new_r = ()
        for k in tl.static_range(len(CUT)):
            d = norm_gradient(g[k], v[k], gain[k], square[k], rms, pull)
            store_piece(dx, target, d, present, k, CUT, WIDTH)
            if PARAMETERS:
                new_p += (add_products(p[k], g[k], v[k] * rms),)
                new_q += (q[k] + tl.sum(g[k], axis=0),)
                new_r += (add_products(r[k], v[k] * pull, v[k]),)
            if not EARLY:  # They need the registers that these leave.
                next_g += (fetch_piece(up, row * dout_n, dout_d, inside, k, CUT, WIDTH),)
                next_v += (fetch_piece(source, row * x_n, x_d, inside, k, CUT, WIDTH),)
        if PARAMETERS:
            p, q, r = new_p, new_q, new_r
    if PARAMETERS:
        store_sums(partial + tl.program_id(0).to(tl.int64) * (3 * WIDTH), p, q, r, CUT, WIDTH)


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    quantised: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``[B, N, D]`` to ``[B, N, D]``; quantised, in e4m3, and scales ``[B, N, 1]``."""
    out, scales = quantised_like(x) if quantised else (blank(x), None)
    samples, tokens, width = x.shape
    w1, w2, shift, scale = map(unit_stride, (w1, w2, shift, scale))
    launch, _ = whole_waves(x, COLUMNS, REGISTERS)
    chunks = cdiv(tokens, launch.rows)
    with on_device(x):
        if out.numel():
            _forward_kernel[(samples * chunks,)](
                x,
                w1,
                w2,
                shift,
                scale,
                out,
                scales,
                tokens,
                launch.rows,
                chunks,
                *x.stride(),
                shift.stride(0),
                scale.stride(0),
                EPS=eps,
                WIDTH=width,
                ACC=accumulator(x, w1, w2, shift, scale),
                QUANTISED=scales is not None,
                **launch.constants,
            )
    return out if scales is None else (out, scales)


forward_quantised = partial(forward, quantised=True)


def backward(
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x and, with ``parameters``, of w1, w2, shift and scale, else empty tensors."""
    samples, tokens, width = x.shape
    dx = blank(x)
    norm = Modulation(*map(unit_stride, (w1, w2, shift, scale)))
    acc = accumulator(x, *norm)
    launch, depth = summed_launch(x, BACKWARD_COLUMNS, BACKWARD_DEPTH)
    chunks = cdiv(tokens, launch.rows)
    partial = partial_sums(x, acc, (samples, chunks), 3) if parameters else None
    with on_device(x):
        if dx.numel():
            _backward_kernel[(samples * chunks,)](
                dout,
                x,
                norm.w1,
                norm.w2,
                norm.scale,
                dx,
                partial,
                tokens,
                launch.rows,
                chunks,
                *dout.stride(),
                *x.stride(),
                norm.scale.stride(0),
                EPS=eps,
                WIDTH=width,
                ACC=acc,
                DEPTH=depth,
                EARLY=depth > 1 or not parameters,
                PARAMETERS=parameters,
                **launch.constants,
            )
        if partial is None:
            return dx, *(x.new_empty(0) for _ in norm)
        _, _, gradient = parameter_gradients(partial, None, None, norm, eps=eps, acc=acc)
        assert gradient is not None
        return dx, *gradient
