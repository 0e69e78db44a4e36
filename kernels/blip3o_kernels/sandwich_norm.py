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
    load_parameter,
    load_piece,
    load_rows,
    rows_of,
    store_piece,
    store_rows,
    zeros,
)
from blip3o_kernels.quantise import quantised_like, store_quantised
from blip3o_kernels.tiles import token_range
from blip3o_kernels.typed import cdiv, jit

COLUMNS = 32
"""Columns of a thread: a warp holds a row of up to 1,024."""

BACKWARD_COLUMNS = 24
BACKWARD_REGISTERS = 3.5
"""For a column: three sums and what comes and goes. The two inputs of 16 bits add one."""


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
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    factor = scale + sample * scale_b
    gain, square = load_norm(w1, w2, factor, None, False, EPS, CUT, WIDTH, ROWS, ACC)
    kept = partial
    if PARAMETERS:
        kept = keep_norm(partial, gain, square, CUT, WIDTH, ROWS)
    up, source = dout + sample * dout_b, x + sample * x_b
    p = zeros(CUT, ROWS, ACC)
    q = zeros(CUT, ROWS, ACC)
    r = zeros(CUT, ROWS, ACC)
    for token in range(first, last, ROWS):
        row, inside = rows_of(token, last, ROWS)
        upstream = load_rows(up, row * dout_n, dout_d, inside, CUT, WIDTH, ACC)
        values = load_rows(source, row * x_n, x_d, inside, CUT, WIDTH, ACC)
        rms, pull = gradient_factors(
            upstream, values, kept, gain, square, EPS, CUT, WIDTH, ROWS, ACC, PARAMETERS
        )
        target = (sample * tokens + row) * WIDTH
        new_p = ()
        new_q = ()
        new_r = ()
        for k in tl.static_range(len(CUT)):
            # Read again, a piece at a time: the sums need the registers.
            g = load_piece(up, row * dout_n, dout_d, inside, k, CUT, WIDTH, ACC, True)
            v = load_piece(source, row * x_n, x_d, inside, k, CUT, WIDTH, ACC, True)
            gain_k, square_k = norm_piece(
                kept, gain, square, k, CUT, WIDTH, ROWS, ACC, PARAMETERS, True
            )
            d = norm_gradient(g, v, gain_k, square_k, rms, pull)
            store_piece(dx, target, d, inside, k, CUT, WIDTH)
            if PARAMETERS:
                new_p += (tl.fma(g, v * rms, p[k]),)
                new_q += (q[k] + g,)
                new_r += (tl.fma(v * pull, v, r[k]),)
        if PARAMETERS:
            p, q, r = new_p, new_q, new_r
    if PARAMETERS:
        store_partial_sums(partial, p, q, r, CUT, WIDTH)


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
    out, scales = quantised_like(x) if quantised else (x.new_empty(x.shape), None)
    samples, tokens, width = x.shape
    w1, w2, shift, scale = map(unit_stride, (w1, w2, shift, scale))
    launch = forward_launch(width, samples * tokens, COLUMNS)
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
    dx = x.new_empty(x.shape)
    norm = Modulation(*map(unit_stride, (w1, w2, shift, scale)))
    acc = accumulator(x, *norm)
    per_column = BACKWARD_REGISTERS + x.element_size() / 2
    launch, registers = backward_launch(width, samples, tokens, BACKWARD_COLUMNS, per_column)
    chunks = cdiv(tokens, launch.rows)
    partial = partial_sums(x, acc, (samples, chunks)) if parameters else None
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
                PARAMETERS=parameters,
                maxnreg=registers,
                **launch.constants,
            )
        if partial is None:
            return dx, *(x.new_empty(0) for _ in norm)
        return dx, *parameter_gradients(partial, norm, None, eps=eps, acc=acc)[0]
