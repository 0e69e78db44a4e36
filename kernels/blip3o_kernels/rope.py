"""Rotary positions (arXiv:2104.09864) on the packed projection ``[B, N, (H + 2K) d]``, one launch.

With j = i + d/2 and tables ``[N, d]`` of full width, whose halves may differ:

    out[i] = q[i] cos[i] - q[j] sin[i]        out[j] = q[j] cos[j] + q[i] sin[j]

for the first H + K heads; the K value heads pass through. The map is linear. The backward pass is
its adjoint, which takes other entries of the table. It is not the same map with -sin:

    dq[i] = g[i] cos[i] + g[j] sin[j]         dq[j] = g[j] cos[j] - g[i] sin[i]

One side is packed. The other is queries, keys and values apart, or all heads as queries. So nothing
joins three gradients before the backward pass, which reads them and writes them packed.

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


@jit
def _chosen(of_k, of_v, q, k, v):
    return tl.where(of_v, v, tl.where(of_k, k, q))


@jit(do_not_specialize=["rows", "tokens"])
def _rotate_kernel(
    packed,
    q,
    k,
    v,
    cos,
    sin,
    rows,
    tokens,
    packed_b,
    packed_n,
    packed_d,
    q_b,
    q_n,
    q_h,
    q_d,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_h,
    cos_n,
    sin_n,
    TURNED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    ADJOINT: tl.constexpr,
):
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
    if KV_HEADS:
        first_key: tl.constexpr = HEADS - 2 * KV_HEADS
        first_value: tl.constexpr = HEADS - KV_HEADS
        of_k, of_v = head >= first_key, head >= first_value
        q = _chosen(of_k, of_v, q, k, v)
        q_b = _chosen(of_k, of_v, q_b, k_b, v_b)
        q_n = _chosen(of_k, of_v, q_n, k_n, v_n)
        q_h = _chosen(of_k, of_v, q_h, k_h, v_h)
        head -= _chosen(of_k, of_v, 0, first_key, first_value)
    if ADJOINT:
        source = q + (sample * q_b + token * q_n + head.to(tl.int64) * q_h)
        source_i, source_d = col.to(tl.int64), q_d
    else:
        source = packed + (sample * packed_b + token * packed_n)
        source_i, source_d = i, packed_d
    low = tl.load(source + source_i * source_d, mask=inside, other=0.0)
    high = tl.load(source + (source_i + half) * source_d, mask=inside, other=0.0)
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
    if ADJOINT:
        target = packed + (sample * packed_b + token * packed_n)
        target_i, target_d = i, packed_d
    else:
        target = q + (sample * q_b + token * q_n)
        target_i, target_d = (head * WIDTH + col).to(tl.int64), q_d
    first = tl.where(turned, first.to(low.dtype), low)
    tl.store(target + target_i * target_d, first, mask=inside)
    second = tl.where(turned, second.to(high.dtype), high)
    tl.store(target + (target_i + half) * target_d, second, mask=inside)


def _rotate(
    packed: Tensor,
    apart: tuple[Tensor, Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    turned: int,
    *,
    adjoint: bool = False,
) -> None:
    """Write the rows of ``packed`` into ``apart``, or with ``adjoint`` the other way.

    ``apart`` is queries, keys and values with contiguous columns, or None: in place. The first
    ``turned`` heads turn. The others are copied, or in place left alone.
    """
    if not packed.numel():
        return
    samples, tokens, columns = packed.shape
    width = cos.shape[1]
    cos, sin = unit_stride(cos), unit_stride(sin)
    if apart is None:
        b, n, d = packed.stride()
        heads, kv_heads = (packed, None, None), 0
        strides = (b, n, width * d, d, *(0,) * 6)
        present = turned
    else:
        q, k, v = heads = apart
        kv_heads = k.shape[2]
        strides = (*q.stride(), *k.stride()[:3], *v.stride()[:3])
        present = columns // width
    half_block = next_power_of_2(width // 2)
    heads_block = max(1, PAIRS // half_block)
    with on_device(packed):
        _rotate_kernel[(cdiv(samples * tokens * present, heads_block),)](
            packed,
            *heads,
            cos,
            sin,
            samples * tokens,
            tokens,
            *packed.stride(),
            *strides,
            cos.stride(0),
            sin.stride(0),
            TURNED=turned,
            KV_HEADS=kv_heads,
            HEADS=present,
            WIDTH=width,
            HEADS_BLOCK=heads_block,
            HALF_BLOCK=half_block,
            ACC=accumulator(packed, cos, sin),
            ADJOINT=adjoint,
            num_warps=4,
            enable_fp_fusion=False,
        )


def forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, turned: int
) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors of ``heads``, ``kv_heads`` and again ``kv_heads`` heads, ``[B, N, heads, d]``.

    The first ``turned`` of them all are turned.
    """
    samples, tokens, _ = qkv.shape
    width = cos.shape[1]
    q = qkv.new_empty(samples, tokens, heads, width)
    k = qkv.new_empty(samples, tokens, kv_heads, width)
    v = qkv.new_empty(samples, tokens, kv_heads, width)
    _rotate(qkv, (q, k, v), cos, sin, turned)
    return q, k, v


def forward_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, turned: int) -> None:
    """Turn the first ``turned`` heads of ``qkv`` in place: all stay packed."""
    del heads, kv_heads
    _rotate(qkv, None, cos, sin, turned)


def backward(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    turned: int,
) -> Tensor:
    """The gradient of ``qkv``, contiguous. A gradient of None is zero."""
    given = next(x for x in (dq, dk, dv) if x is not None)
    samples, tokens, _, width = given.shape
    q, k, v = (
        given.new_zeros(samples, tokens, count, width) if x is None else unit_stride(x)
        for x, count in ((dq, heads), (dk, kv_heads), (dv, kv_heads))
    )
    out = given.new_empty(samples, tokens, (heads + 2 * kv_heads) * width)
    _rotate(out, (q, k, v), cos, sin, turned, adjoint=True)
    return out
