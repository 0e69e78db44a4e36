"""``out = silu(gate) * up`` with ``gate_up = [gate | up]`` packed in a row (arXiv:2002.05202).

Forward, per column of the output: reads 2 elements, writes 1. Quantised, it writes a byte, and a
scale a row. Backward: with s = sigmoid(gate), ``d_up = g gate s`` and
``d_gate = g up s (1 + gate (1 - s))``; reads 3 elements, writes 2. Only ``gate_up`` is saved.
Accumulates in fp32 (fp64 for fp64).
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.arithmetic import sigmoid
from blip3o_kernels.launch import (
    ElementwiseLaunch,
    accumulator,
    batched_rows,
    blank,
    elementwise_launch,
    on_device,
    whole_rows_launch,
)
from blip3o_kernels.quantise import quantised, quantised_like, row_scale
from blip3o_kernels.tiles import load_tile, offsets, tile
from blip3o_kernels.typed import jit


@jit(do_not_specialize=["rows", "tokens"])
def _forward_kernel(
    gate_up,
    out,
    scales,
    rows,
    tokens,
    width,
    stride_b,
    stride_n,
    stride_d,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    row, col, inside = tile(rows, width, ROWS, COLS)
    source = gate_up + offsets(row, col, tokens, stride_b, stride_n, stride_d)
    half = tl.cast(width, tl.int64) * stride_d
    gate = tl.load(source, mask=inside, other=0.0).to(ACC)
    up = tl.load(source + half, mask=inside, other=0.0).to(ACC)
    silu = gate * sigmoid(gate)
    if QUANTISED:
        product = (silu * up).to(tl.float32)
        scale = row_scale(product, 1)[:, None]
        result = quantised(product, scale)
        tl.store(scales + row, scale, mask=row < rows)
    else:
        result = (silu * up).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * width + col, result, mask=inside)


@jit(do_not_specialize=["rows", "tokens"])
def _backward_kernel(
    grad,
    gate_up,
    out,
    rows,
    tokens,
    width,
    grad_b,
    grad_n,
    grad_d,
    stride_b,
    stride_n,
    stride_d,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, col, inside = tile(rows, width, ROWS, COLS)
    source = gate_up + offsets(row, col, tokens, stride_b, stride_n, stride_d)
    half = tl.cast(width, tl.int64) * stride_d
    g = load_tile(grad, row, col, tokens, grad_b, grad_n, grad_d, inside, ACC)
    gate = tl.load(source, mask=inside, other=0.0).to(ACC)
    up = tl.load(source + half, mask=inside, other=0.0).to(ACC)
    s = sigmoid(gate)
    target = out + row.to(tl.int64) * (2 * width) + col
    d_gate = g * up * s * (1.0 + gate * (1.0 - s))
    tl.store(target, d_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(target + width, (g * gate * s).to(out.dtype.element_ty), mask=inside)


def forward(gate_up: Tensor) -> Tensor:
    """``[..., 2I]`` to ``[..., I]``."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if out.numel():
        _forward(gate_up, out, None, elementwise_launch(out.numel() // width, width), 4)
    return out


def forward_quantised(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., 2I]`` to ``[..., I]`` in e4m3 with scales ``[..., 1]``, rounded once.

    A program holds whole rows, I at most ``MAX_WIDTH``.
    """
    width = gate_up.shape[-1] // 2
    out, scales = quantised_like(gate_up, width)
    if out.numel():
        launch, num_warps = whole_rows_launch(scales.numel(), width)
        _forward(gate_up, out, scales, launch, num_warps)
    return out, scales


def _forward(
    gate_up: Tensor,
    out: Tensor,
    scales: Tensor | None,
    launch: ElementwiseLaunch,
    num_warps: int,
) -> None:
    source = batched_rows(gate_up)
    tokens = source.shape[1]
    with on_device(gate_up):
        _forward_kernel[launch.grid](
            source,
            out,
            scales,
            source.shape[0] * tokens,
            tokens,
            out.shape[-1],
            *source.stride(),
            ROWS=launch.rows,
            COLS=launch.columns,
            ACC=accumulator(gate_up),
            QUANTISED=scales is not None,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )


def backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of ``gate_up``, contiguous."""
    width = grad.shape[-1]
    out = blank(gate_up)
    if not out.numel():
        return out
    source, upstream = batched_rows(gate_up), batched_rows(grad)
    tokens = source.shape[1]
    rows = source.shape[0] * tokens
    launch = elementwise_launch(rows, width)
    with on_device(gate_up):
        _backward_kernel[launch.grid](
            upstream,
            source,
            out,
            rows,
            tokens,
            width,
            *upstream.stride(),
            *source.stride(),
            ROWS=launch.rows,
            COLS=launch.columns,
            ACC=accumulator(gate_up),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
