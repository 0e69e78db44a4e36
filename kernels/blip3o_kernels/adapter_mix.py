"""``out = g adapted + (1 - g) residual`` with ``g = sigmoid(gate)``: the adapter's two paths.

Forward, per element: reads 3, writes 1. Backward: with D = dout, ``d_adapted = D g``,
``d_residual = D (1 - g)``, ``d_gate = D (adapted - residual) g (1 - g)``; reads 4, writes 3.
Only the inputs are saved. Computes in fp32 (fp64 for fp64).
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.arithmetic import sigmoid
from blip3o_kernels.launch import accumulator, blank, elementwise_launch, merged, on_device
from blip3o_kernels.tiles import load_tile, tile
from blip3o_kernels.typed import jit


@jit(do_not_specialize=["rows", "tokens"])
def _forward_kernel(
    gate,
    adapted,
    residual,
    out,
    rows,
    tokens,
    width,
    gate_b,
    gate_n,
    gate_d,
    adapted_b,
    adapted_n,
    adapted_d,
    residual_b,
    residual_n,
    residual_d,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, col, inside = tile(rows, width, ROWS, COLS)
    logit = load_tile(gate, row, col, tokens, gate_b, gate_n, gate_d, inside, ACC)
    a = load_tile(adapted, row, col, tokens, adapted_b, adapted_n, adapted_d, inside, ACC)
    r = load_tile(residual, row, col, tokens, residual_b, residual_n, residual_d, inside, ACC)
    g = sigmoid(logit)
    result = g * a + (1.0 - g) * r
    tl.store(out + row.to(tl.int64) * width + col, result.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "tokens"])
def _backward_kernel(
    dout,
    gate,
    adapted,
    residual,
    dgate,
    dadapted,
    dresidual,
    rows,
    tokens,
    width,
    dout_b,
    dout_n,
    dout_d,
    gate_b,
    gate_n,
    gate_d,
    adapted_b,
    adapted_n,
    adapted_d,
    residual_b,
    residual_n,
    residual_d,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, col, inside = tile(rows, width, ROWS, COLS)
    upstream = load_tile(dout, row, col, tokens, dout_b, dout_n, dout_d, inside, ACC)
    g = sigmoid(load_tile(gate, row, col, tokens, gate_b, gate_n, gate_d, inside, ACC))
    a = load_tile(adapted, row, col, tokens, adapted_b, adapted_n, adapted_d, inside, ACC)
    r = load_tile(residual, row, col, tokens, residual_b, residual_n, residual_d, inside, ACC)
    target = row.to(tl.int64) * width + col
    first, second = upstream * g, upstream * (1.0 - g)
    tl.store(dgate + target, (first * (1.0 - g) * (a - r)).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dadapted + target, first.to(dadapted.dtype.element_ty), mask=inside)
    tl.store(dresidual + target, second.to(dresidual.dtype.element_ty), mask=inside)


def forward(gate: Tensor, adapted: Tensor, residual: Tensor) -> Tensor:
    """``[B, N, D]`` each, to ``[B, N, D]`` in the dtype of ``gate``."""
    out = blank(gate)
    if not out.numel():
        return out
    sources = merged(gate, adapted, residual)
    samples, tokens, width = sources[0].shape
    launch = elementwise_launch(samples * tokens, width)
    with on_device(gate):
        _forward_kernel[launch.grid](
            *sources,
            out,
            samples * tokens,
            tokens,
            width,
            *(stride for x in sources for stride in x.stride()),
            ROWS=launch.rows,
            COLS=launch.columns,
            ACC=accumulator(gate, adapted, residual),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def backward(
    dout: Tensor, gate: Tensor, adapted: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate, adapted and residual, contiguous."""
    grads = tuple(blank(x) for x in (gate, adapted, residual))
    if gate.numel():
        sources = merged(dout, gate, adapted, residual)
        samples, tokens, width = sources[0].shape
        launch = elementwise_launch(samples * tokens, width)
        with on_device(gate):
            _backward_kernel[launch.grid](
                *sources,
                *grads,
                samples * tokens,
                tokens,
                width,
                *(stride for x in sources for stride in x.stride()),
                ROWS=launch.rows,
                COLS=launch.columns,
                ACC=accumulator(gate, adapted, residual),
                num_warps=4,
                enable_fp_fusion=False,
            )
    return grads[0], grads[1], grads[2]
