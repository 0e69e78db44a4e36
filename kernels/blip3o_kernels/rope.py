"""Rotary positions (arXiv:2104.09864) on the packed projection ``[B, N, (H + 2K) d]``, one launch.

With j = i + d/2 and tables ``[N, d]`` of full width, whose halves may differ:

    out[i] = q[i] cos[i] - q[j] sin[i]        out[j] = q[j] cos[j] + q[i] sin[j]

for the first H + K heads; the K value heads pass through. The map is linear. The backward pass is
its adjoint, which takes other entries of the table. It is not the same map with -sin:

    dq[i] = g[i] cos[i] + g[j] sin[j]         dq[j] = g[j] cos[j] - g[i] sin[i]

Per token: reads (H + 2K) d elements and writes as many; in place it moves 2 (H + K) d in all. All
heads read the same 2 d table entries, from cache. Computes in fp32 (fp64 for fp64). One program
turns one token.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import accumulator, on_device, unit_stride
from blip3o_kernels.typed import jit, next_power_of_2


@jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    qkv,
    cos,
    sin,
    out,
    tokens,
    qkv_b,
    qkv_n,
    qkv_d,
    cos_n,
    sin_n,
    out_b,
    out_n,
    out_d,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PASSED: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PASSED_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    sample = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    source = qkv + sample * qkv_b + token * qkv_n
    target = out + sample * out_b + token * out_n
    dtype = out.dtype.element_ty
    half: tl.constexpr = WIDTH // 2
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    col = tl.arange(0, HALF_BLOCK)[None, :]
    present = col < half
    inside = (head < HEADS) & present
    i = (head * WIDTH + col).to(tl.int64)
    j = i + half
    low = tl.load(source + i * qkv_d, mask=inside, other=0.0).to(ACC)
    high = tl.load(source + j * qkv_d, mask=inside, other=0.0).to(ACC)
    cos_i = tl.load(cos + token * cos_n + col, mask=present, other=0.0).to(ACC)
    cos_j = tl.load(cos + token * cos_n + half + col, mask=present, other=0.0).to(ACC)
    sin_i = tl.load(sin + token * sin_n + col, mask=present, other=0.0).to(ACC)
    sin_j = tl.load(sin + token * sin_n + half + col, mask=present, other=0.0).to(ACC)
    if ADJOINT:
        first, second = low * cos_i + high * sin_j, high * cos_j - low * sin_i
    else:
        first, second = low * cos_i - high * sin_i, high * cos_j + low * sin_j
    tl.store(target + i * out_d, first.to(dtype), mask=inside)
    tl.store(target + j * out_d, second.to(dtype), mask=inside)
    if PASSED:
        rest = tl.arange(0, PASSED_BLOCK)
        column = (HEADS * WIDTH + rest).to(tl.int64)
        values = tl.load(source + column * qkv_d, mask=rest < PASSED, other=0.0)
        tl.store(target + column * out_d, values, mask=rest < PASSED)


def _rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, heads: int, *, adjoint: bool
) -> None:
    """Write the first ``heads`` heads of ``qkv`` turned into ``out``, and copy the rest."""
    if not out.numel():
        return
    samples, tokens, columns = qkv.shape
    width = cos.shape[1]
    cos, sin = unit_stride(cos), unit_stride(sin)
    passed = 0 if out is qkv else columns - heads * width
    heads_block, half_block = next_power_of_2(heads), next_power_of_2(width // 2)
    with on_device(qkv):
        _rotate_kernel[(samples * tokens,)](
            qkv,
            cos,
            sin,
            out,
            tokens,
            *qkv.stride(),
            cos.stride(0),
            sin.stride(0),
            *out.stride(),
            HEADS=heads,
            WIDTH=width,
            PASSED=passed,
            HEADS_BLOCK=heads_block,
            HALF_BLOCK=half_block,
            PASSED_BLOCK=next_power_of_2(max(passed, 1)),
            ACC=accumulator(qkv, cos, sin),
            ADJOINT=adjoint,
            num_warps=max(1, min(8, heads_block * half_block // 256)),
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
