"""Rotary positions (arXiv:2104.09864) on the packed projection ``[B, N, (H + 2K) d]``, one launch.

With j = i + d/2 and tables ``[N, d]`` of full width, whose halves may differ:

    out[i] = q[i] cos[i] - q[j] sin[i]        out[j] = q[j] cos[j] + q[i] sin[j]

for the first H + K heads; the K value heads pass through. The map is linear. The backward pass is
its adjoint, which takes other entries of the table. It is not the same map with -sin:

    dq[i] = g[i] cos[i] + g[j] sin[j]         dq[j] = g[j] cos[j] - g[i] sin[i]

Per token: reads (H + 2K) d elements and writes as many; in place it moves 2 (H + K) d in all. All
heads read the same 2 d table entries, from cache. Computes in fp32 (fp64 for fp64). A program turns
``PAIRS`` pairs of columns: whole heads of one token after another, so that no thread is idle.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import accumulator, on_device, unit_stride
from blip3o_kernels.typed import cdiv, jit, next_power_of_2

PAIRS = 1024
"""Of a program: 8 for each of 128 threads, two 16-byte loads."""


@jit(do_not_specialize=["rows", "tokens"])
def _rotate_kernel(
    qkv,
    cos,
    sin,
    out,
    rows,
    tokens,
    qkv_b,
    qkv_n,
    qkv_d,
    cos_n,
    sin_n,
    out_b,
    out_n,
    out_d,
    TURNED: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    dtype = out.dtype.element_ty
    half: tl.constexpr = WIDTH // 2
    index = tl.program_id(0) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)[:, None]
    row = index // HEADS
    head = index % HEADS
    sample = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)
    col = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (row < rows) & (col < half)
    turned = inside & (head < TURNED)
    i = (head * WIDTH + col).to(tl.int64)
    j = i + half
    source = qkv + (sample * qkv_b + token * qkv_n)
    low = tl.load(source + i * qkv_d, mask=inside, other=0.0)
    high = tl.load(source + j * qkv_d, mask=inside, other=0.0)
    cosines, sines = cos + (token * cos_n + col), sin + (token * sin_n + col)
    cos_i = tl.load(cosines, mask=turned, other=0.0).to(ACC)
    cos_j = tl.load(cosines + half, mask=turned, other=0.0).to(ACC)
    sin_i = tl.load(sines, mask=turned, other=0.0).to(ACC)
    sin_j = tl.load(sines + half, mask=turned, other=0.0).to(ACC)
    a, b = low.to(ACC), high.to(ACC)
    if ADJOINT:
        first, second = a * cos_i + b * sin_j, b * cos_j - a * sin_i
    else:
        first, second = a * cos_i - b * sin_i, b * cos_j + a * sin_j
    target = out + (sample * out_b + token * out_n)
    tl.store(target + i * out_d, tl.where(turned, first.to(dtype), low), mask=inside)
    tl.store(target + j * out_d, tl.where(turned, second.to(dtype), high), mask=inside)


def _rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, adjoint: bool
) -> None:
    """Write the first ``heads`` heads of ``qkv`` turned into ``out``, and copy the rest."""
    if not out.numel():
        return
    samples, tokens, columns = qkv.shape
    width = cos.shape[1]
    cos, sin = unit_stride(cos), unit_stride(sin)
    present = heads if out is qkv else columns // width
    half_block = next_power_of_2(width // 2)
    heads_block = max(1, PAIRS // half_block)
    with on_device(qkv):
        _rotate_kernel[(cdiv(samples * tokens * present, heads_block),)](
            qkv,
            cos,
            sin,
            out,
            samples * tokens,
            tokens,
            *qkv.stride(),
            cos.stride(0),
            sin.stride(0),
            *out.stride(),
            TURNED=heads,
            HEADS=present,
            WIDTH=width,
            HEADS_BLOCK=heads_block,
            HALF_BLOCK=half_block,
            ACC=accumulator(qkv, cos, sin),
            ADJOINT=adjoint,
            num_warps=4,
            enable_fp_fusion=False,
        )


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """A new tensor with the first ``heads`` heads turned."""
    out = qkv.new_empty(qkv.shape)
    _rotate(qkv, cos, sin, out, heads, adjoint=False)
    return out


def forward_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Turn the first ``heads`` heads of ``qkv`` in place."""
    _rotate(qkv, cos, sin, qkv, heads, adjoint=False)


def backward(grad: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The gradient of ``qkv``, contiguous."""
    out = grad.new_empty(grad.shape)
    _rotate(grad, cos, sin, out, heads, adjoint=True)
    return out
