"""``out = gelu(layer_norm(x[:W]) * w + b)`` on rows padded to P >= W columns; the padding is 0.

    xhat = (x - mean) rstd        u = w xhat + b
    out = u Phi(u)                Phi(u) = (1 + erf(u / sqrt 2)) / 2

(arXiv:1607.06450, arXiv:1606.08415, exact form). Mean and variance run over the W true columns.
Backward, with du = dout (Phi(u) + u phi(u)) and g = w du:

    dx = rstd (g - mean(g) - xhat mean(g xhat))        dw = sum du xhat        db = sum du

Forward, per row: reads P elements, writes P. Backward: reads 2 P, writes P, and 2 P fp32 partial
sums per program. Whole rows are read, since a mask that ends at an odd W would split the 16-byte
accesses; the padding is then ignored. Only the inputs are saved. Accumulates in fp32 (fp64 for
fp64).
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import (
    accumulator,
    backward_launch,
    forward_launch,
    merged_rows,
    on_device,
    torch_accumulator,
    unit_stride,
)
from blip3o_kernels.reduction import column_sum, sum2
from blip3o_kernels.tiles import load_row, load_vector, token_range
from blip3o_kernels.typed import cdiv, jit


@jit
def _standardised(x, inside, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """``xhat``, 0 outside the true columns, and ``rstd``."""
    x = tl.where(inside, x, 0.0)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + EPS)
    return centred * rstd, rstd


@jit
def _normal_cdf(u):
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@jit
def _normal_pdf(u):
    return 0.3989422804014327 * tl.exp(-0.5 * u * u)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _forward_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    rows,
    chunks,
    x_b,
    x_n,
    x_d,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside, stored = cols < WIDTH, cols < PADDED
    w = load_vector(weight, cols, inside, ACC)
    b = load_vector(bias, cols, inside, ACC)
    for token in range(first, last):
        row = load_row(x + sample * x_b, token, cols, x_n, x_d, stored, ACC)
        xhat, _ = _standardised(row, inside, EPS, WIDTH)
        u = w * xhat + b
        h = u * _normal_cdf(u)
        target = out + (sample * tokens + token) * PADDED
        tl.store(target + cols, h.to(out.dtype.element_ty), mask=stored)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _backward_kernel(
    dout,
    x,
    weight,
    bias,
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
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    cols = tl.arange(0, BLOCK)
    inside, stored = cols < WIDTH, cols < PADDED
    w = load_vector(weight, cols, inside, ACC)
    b = load_vector(bias, cols, inside, ACC)
    dw = tl.zeros((BLOCK,), ACC)
    db = tl.zeros((BLOCK,), ACC)
    for token in range(first, last):
        upstream = load_row(dout + sample * dout_b, token, cols, dout_n, dout_d, stored, ACC)
        row = load_row(x + sample * x_b, token, cols, x_n, x_d, stored, ACC)
        xhat, rstd = _standardised(row, inside, EPS, WIDTH)
        u = w * xhat + b
        du = tl.where(inside, upstream, 0.0) * (_normal_cdf(u) + u * _normal_pdf(u))
        g = w * du
        sum_g, sum_gx = sum2(g, g * xhat)
        d = rstd * (g - sum_g / WIDTH - xhat * (sum_gx / WIDTH))
        target = dx + (sample * tokens + token) * PADDED
        d = tl.where(inside, d, 0.0).to(dx.dtype.element_ty)
        tl.store(target + cols, d, mask=stored)
        if PARAMETERS:
            dw += du * xhat
            db += du
    if PARAMETERS:
        target = partial + tl.program_id(0).to(tl.int64) * (2 * PADDED) + cols
        tl.store(target, dw, mask=stored)
        tl.store(target + PADDED, db, mask=stored)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``[B, N, P]`` to ``[B, N, P]``."""
    out = x.new_empty(x.shape)
    weight, bias = unit_stride(weight), unit_stride(bias)
    (source,) = merged_rows(x)
    samples, tokens, padded = source.shape
    launch = forward_launch(padded, samples * tokens)
    if not out.numel():
        return out
    chunks = cdiv(tokens, launch.rows)
    with on_device(x):
        _forward_kernel[(samples * chunks,)](
            source,
            weight,
            bias,
            out,
            tokens,
            launch.rows,
            chunks,
            *source.stride(),
            EPS=eps,
            WIDTH=weight.shape[0],
            PADDED=padded,
            BLOCK=launch.block,
            ACC=accumulator(x, weight, bias),
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, with ``parameters``, of weight and bias, else empty tensors."""
    dx = x.new_empty(x.shape)
    weight, bias = unit_stride(weight), unit_stride(bias)
    upstream, source = merged_rows(dout, x)
    samples, tokens, padded = source.shape
    width = weight.shape[0]
    acc = accumulator(x, weight, bias)
    launch = backward_launch(padded, samples * tokens)
    chunks = cdiv(tokens, launch.rows)
    partial = None
    if parameters:
        partial = x.new_empty((samples * chunks, 2, padded), dtype=torch_accumulator(acc))
    with on_device(x):
        if dx.numel():
            _backward_kernel[(samples * chunks,)](
                upstream,
                source,
                weight,
                bias,
                dx,
                partial,
                tokens,
                launch.rows,
                chunks,
                *upstream.stride(),
                *source.stride(),
                EPS=eps,
                WIDTH=width,
                PADDED=padded,
                BLOCK=launch.block,
                ACC=acc,
                PARAMETERS=parameters,
                num_warps=launch.num_warps,
                enable_fp_fusion=False,
            )
    if partial is None:
        return dx, x.new_empty(0), x.new_empty(0)
    dw, db = weight.new_empty(width), bias.new_empty(width)
    column_sum(partial[:, 0, :width], dw, acc)
    column_sum(partial[:, 1, :width], db, acc)
    return dx, dw, db
