"""``h = rms(rms(x; w1); w2) * (1 + scale) + shift``: RMSNorm and AdaLN (arXiv:2212.09748) in one.

The mathematics is in ``blip3o_kernels.double_norm``. x is ``[B, N, D]``, w1 and w2 ``[D]``, shift
and scale ``[B, D]``.

Forward, per row: reads D elements, writes D. A program reads the parameters once for all its rows.
Quantised, it writes D bytes and a scale. Backward, per row: reads 2 D (dout, x), writes D, and 3 D
fp32 partial sums per program. Only the inputs are saved. Accumulates in fp32 (fp64 for fp64).
"""

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
from blip3o_kernels.tiles import load_row, load_vector, token_range
from blip3o_kernels.typed import cdiv, jit

FORWARD_PROGRAMS = 8
"""Programs of 4 warps that fit on a multiprocessor: 64 registers a thread, without spills."""

QUANTISED_PROGRAMS = 7
"""Programs of 4 warps that fit on a multiprocessor: 72 registers a thread; 64 spill on sm_100."""

BACKWARD_PROGRAMS = 5
"""Programs of 4 warps that fit on a multiprocessor: 96 registers a thread; unbounded 109."""


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
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    weight1, weight2, offset, factor = load_norm(
        w1, w2, shift, scale, sample, shift_b, scale_b, cols, inside, ACC
    )
    for token in range(first, last):
        row = load_row(x + sample * x_b, token, cols, x_n, x_d, inside, ACC)
        h = double_norm(row, weight1, weight2, offset, factor, EPS, WIDTH)
        target = sample * tokens + token
        if QUANTISED:
            store_quantised(out, out_scales, target, h, cols, inside, WIDTH)
        else:
            tl.store(out + target * WIDTH + cols, h.to(out.dtype.element_ty), mask=inside)


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
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    weight1 = load_vector(w1, cols, inside, ACC)
    gain = weight1 * load_vector(w2, cols, inside, ACC)
    gain *= 1.0 + load_vector(scale + sample * scale_b, cols, inside, ACC)
    p = tl.zeros((BLOCK,), ACC)
    q = tl.zeros((BLOCK,), ACC)
    r = tl.zeros((BLOCK,), ACC)
    for token in range(first, last):
        upstream = load_row(dout + sample * dout_b, token, cols, dout_n, dout_d, inside, ACC)
        row = load_row(x + sample * x_b, token, cols, x_n, x_d, inside, ACC)
        d, inverse_rms, m = double_norm_gradient(upstream, row, weight1, gain, EPS, WIDTH)
        target = dx + (sample * tokens + token) * WIDTH
        tl.store(target + cols, d.to(dx.dtype.element_ty), mask=inside)
        if PARAMETERS:
            unit = row * inverse_rms
            p += upstream * unit
            q += upstream
            r += m * unit * unit
    if PARAMETERS:
        store_partial_sums(partial, p, q, r, cols, inside, WIDTH)


def forward(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``[B, N, D]`` to ``[B, N, D]``."""
    out = x.new_empty(x.shape)
    _forward(x, (w1, w2, shift, scale), out, None, eps)
    return out


def forward_quantised(
    x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``[B, N, D]`` to ``[B, N, D]`` in e4m3 with scales ``[B, N, 1]``, rounded once."""
    out, scales = quantised_like(x)
    _forward(x, (w1, w2, shift, scale), out, scales, eps)
    return out, scales


def _forward(
    x: Tensor, norm: tuple[Tensor, ...], out: Tensor, scales: Tensor | None, eps: float
) -> None:
    samples, tokens, width = x.shape
    w1, w2, shift, scale = map(unit_stride, norm)
    launch = forward_launch(width, samples * tokens)
    programs = FORWARD_PROGRAMS if scales is None else QUANTISED_PROGRAMS
    if not out.numel():
        return
    chunks = cdiv(tokens, launch.rows)
    with on_device(x):
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
            BLOCK=launch.block,
            ACC=accumulator(x, w1, w2, shift, scale),
            QUANTISED=scales is not None,
            num_warps=launch.num_warps,
            maxnreg=register_limit(launch, programs),
            enable_fp_fusion=False,
        )


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
    launch = backward_launch(width, samples * tokens)
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
                BLOCK=launch.block,
                ACC=acc,
                PARAMETERS=parameters,
                num_warps=launch.num_warps,
                maxnreg=register_limit(launch, BACKWARD_PROGRAMS),
                enable_fp_fusion=False,
            )
        if partial is None:
            return dx, *(x.new_empty(0) for _ in norm)
        return dx, *parameter_gradients(partial, norm, None, eps=eps, acc=acc)[0]
