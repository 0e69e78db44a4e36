"""The specification: every fused op in plain PyTorch.

Each function is differentiable by autograd and runs on any device in any floating dtype. In 16-bit
dtypes it rounds where the published modules round. Called on fp64 tensors it is the truth that
every kernel is judged by.

Letters are those of ``blip3o_fast.axes``.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Conventions = Literal["consistent", "published"]


class Modulation(NamedTuple):
    """Two norm weights ``[D]``, and ``u * (1 + scale) + shift`` with shift and scale ``[B, D]``."""

    w1: Tensor
    w2: Tensor
    shift: Tensor
    scale: Tensor


class LossWeights(NamedTuple):
    """Weights of the four terms of the flow loss."""

    velocity: float = 1.0
    semantic: float = 0.5
    cosine: float = 0.2
    consistency: float = 0.3


class LossTerms(NamedTuple):
    """Weighted sum, which carries the gradient, and its four unweighted terms (0-d, fp32)."""

    total: Tensor
    velocity: Tensor
    semantic: Tensor
    cosine: Tensor
    consistency: Tensor


class Quantised(NamedTuple):
    """Rows ``[..., K]`` in e4m3, and the fp32 number ``[..., 1]`` that multiplies each row back."""

    values: Tensor
    scales: Tensor


E4M3_MAX = 448.0
"""The largest number of ``torch.float8_e4m3fn``."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Reductions run in fp32, and in fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / rms(x)`` over the last axis (arXiv:1910.07467)."""
    wide = x.to(accumulation_dtype(x.dtype))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * unit.to(x.dtype)


def sandwich_norm(
    x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """RMSNorm, then AdaLN with its own RMSNorm: ``rms(rms(x; w1); w2) * (1 + scale) + shift``."""
    u = rms_norm(rms_norm(x, w1, eps), w2, eps)
    return (u * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def sandwich_join(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Add a branch output ``y`` to the residual stream ``x`` and open the next sub-layer.

    ``post=None`` is the plain pre-norm block (no norm on the branch); ``pre=None`` ends the stack.
    """
    branch = y if layer_scale is None else y * layer_scale
    if post is not None:
        branch = sandwich_norm(branch, *post, eps=eps)
    x = (x + branch).to(x.dtype)
    return x, None if pre is None else sandwich_norm(x, *pre, eps=eps)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """Rotate the query and key heads of a packed projection ``[B, N, (H + 2K) d]``.

    Value heads pass through.
    ``cos`` and ``sin`` are ``[N, d]``, full width: the two halves of a head may turn by different
    angles, as they do in the published layout. ``num_kv_heads=0`` rotates queries alone.
    """
    B, N, _ = qkv.shape
    d = cos.shape[-1]
    turned = (num_heads + num_kv_heads) * d
    heads = qkv[..., :turned].reshape(B, N, num_heads + num_kv_heads, d)
    low, high = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(qkv.dtype), sin[:, None].to(qkv.dtype)
    heads = heads * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((heads.reshape(B, N, turned), qkv[..., turned:]), dim=-1)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of a packed ``[..., 2I]``, gate first (arXiv:2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gemm_swiglu(x: Tensor, weight: Tensor, tile: int | None = None) -> Tensor:
    """``swiglu`` of ``x W^T``, with rows ``[..., D]`` and a weight ``[2I, D]``, gate first.

    ``tile`` says how a kernel cuts the product.
    """
    del tile
    return swiglu(F.linear(x, weight))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention: q ``[B, N, H, d]``, k and v ``[B, M, K, d]`` with K dividing H."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = logits.softmax(-1, dtype=accumulation_dtype(q.dtype)).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def rope_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rotates_keys: bool
) -> Tensor:
    """``attention`` of queries, and if ``rotates_keys`` of keys, that ``rope`` has rotated."""

    def rotated(x: Tensor) -> Tensor:
        return rope(x.flatten(2), cos, sin, x.shape[2], 0).view(x.shape)

    return attention(rotated(q), rotated(k) if rotates_keys else k, v)


def adapter_norm(
    x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, dropped: int
) -> Tensor:
    """LayerNorm and exact GELU over the first ``len(weight)`` columns; the padding stays zero.

    Then dropout of ``dropped`` elements of 65,536, as ``kept`` says; 0 is none and needs no seed.
    """
    width = weight.shape[0]
    wide = torch.promote_types(x.dtype, weight.dtype)
    row = x[..., :width].to(wide)
    u = F.layer_norm(row, (width,), weight.to(wide), bias.to(wide), eps)
    u = F.gelu(u.to(x.dtype))
    if dropped:
        assert seed is not None
        mask = kept(seed, x.shape[0] * x.shape[1], width, dropped).view(u.shape)
        u = torch.where(mask, u * (65536 / (65536 - dropped)), 0)
    return F.pad(u, (0, x.shape[-1] - width))


def kept(seed: Tensor, rows: int, columns: int, dropped: int) -> Tensor:
    """The elements ``[rows, columns]`` that dropout keeps: all but ``dropped`` of 65,536.

    ``seed`` is int64 ``[1]``, the key of a Philox4x32 generator of 7 rounds, the fewest that pass
    all tests (https://doi.org/10.1145/2063384.2063405). Its counter is a row and a group of eight
    columns. Halves of its four words, low ones first, are an int16 for each, which is kept if it is
    at least ``dropped - 32768``. So an element depends on the seed, its row and its column only.
    """
    low = 0xFFFFFFFF
    row = torch.arange(rows, device=seed.device)[:, None]
    group = torch.arange(-(-columns // 8), device=seed.device)
    # The second and fourth word may hold more than 32 bits, which are cut off later.
    words = group, row, torch.zeros_like(row), torch.zeros_like(row)
    keys = seed, seed >> 32
    for _ in range(7):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        first = (b >> 32 ^ words[1]).bitwise_xor_(keys[0]).bitwise_and_(low)
        third = (a >> 32 ^ words[3]).bitwise_xor_(keys[1]).bitwise_and_(low)
        words = first, b, third, a
        keys = keys[0] + 0x9E3779B9, keys[1] + 0xBB67AE85
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).to(torch.int32)
    return bits.flatten(1).view(torch.int16)[:, :columns] >= dropped - 32768


def adapter_mix(gate: Tensor, adapted: Tensor, residual: Tensor) -> Tensor:
    """Gated sum of the adapter's two paths, ``g * adapted + (1 - g) * residual``, g a sigmoid."""
    g = torch.sigmoid(gate)
    return (g * adapted + (1 - g) * residual).to(gate.dtype)


def solver_update(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    *,
    slot: Tensor | None = None,
    clamp: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """``c[0] x + c[1] v + c[2] slopes[0] + c[3] slopes[1] + ..``, added in this order.

    A row of ``slopes`` whose coefficient is zero counts as zeros, whatever it holds. Then row
    ``slot`` of ``slopes`` becomes v. With guidance, ``velocity`` stacks the conditional half over
    the unconditional one, ``[2B, N, C]``, and ``v = v_uncond + guidance_scale * (v_cond -
    v_uncond)`` (arXiv:2207.12598).
    """
    slope = velocity.to(x.dtype)
    if guidance_scale != 1.0:
        conditional, unconditional = slope.chunk(2)
        slope = unconditional + guidance_scale * (conditional - unconditional)
    total = coefficients[0] * x + coefficients[1] * slope
    for coefficient, earlier in zip(coefficients[2:], slopes, strict=True):
        total = total + coefficient * torch.where(coefficient == 0, 0, earlier)
    if slot is not None:
        is_slot = torch.arange(len(slopes), device=slopes.device) == slot
        slopes.copy_(torch.where(is_slot[:, None, None, None], slope, slopes))
    return total if clamp is None else total.clamp(-clamp, clamp)


def quantise_rows(x: Tensor) -> Quantised:
    """Every row ``[..., K]``, K at least 1, over its largest magnitude, as e4m3 (arXiv:2209.05433).

    In fp32: ``scale = max |x| / 448``, and ``x * (1 / scale)`` to the nearest, ties to even. That
    product exceeds 448 by two roundings of fp32 at most, and becomes 448: nothing overflows. Scales
    are normal numbers, so a row of zeros stays one. A row with a NaN or an infinity is NaN when it
    is multiplied back.
    """
    wide = x.float()
    smallest = torch.finfo(torch.float32).tiny
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=E4M3_MAX * smallest)
    scales = largest / E4M3_MAX
    return Quantised((wide * (1 / scales)).to(torch.float8_e4m3fn), scales)


def scaled_linear(x: Quantised, weight: Quantised) -> Tensor:
    """``x W^T`` in bf16: x ``[..., K]``, W ``[out, K]``; sums in fp32, scaled when complete."""
    total = x.values.float() @ weight.values.float().T
    return total.mul_(x.scales).mul_(weight.scales[:, 0]).bfloat16()


def flow_loss(
    velocity: Tensor,
    x_t: Tensor,
    x_1: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    weights: LossWeights,
    conventions: Conventions,
    masks: bool,
) -> LossTerms:
    """Velocity, semantic, cosine and consistency terms of rectified-flow training.

    ``consistent`` estimates the clean sample as ``x_t + (1 - t) v``; ``published`` uses the
    published code's opposite sign, clamps t to [0.001, 0.999] and caps the terms as that code
    does. ``masks`` restricts the semantic and consistency terms to samples with t > 0.5.
    """
    wide = accumulation_dtype(velocity.dtype)
    velocity, x_t, x_1, noise, t = (u.to(wide) for u in (velocity, x_t, x_1, noise, t))
    published = conventions == "published"
    if published:
        t = t.clamp(1e-3, 1 - 1e-3)
    sign = -1 if published else 1
    clean = x_t + sign * (1 - t)[:, None, None] * velocity
    active = (t > 0.5).to(wide) if masks else torch.ones_like(t)

    def over_active(per_sample: Tensor) -> Tensor:
        return (per_sample * active).sum() / active.sum().clamp(min=1)

    velocity_term = (velocity - (x_1 - noise)).square().mean()
    semantic = over_active((clean - x_1).square().mean((1, 2)))
    cosine = 1 - F.cosine_similarity(clean, x_1, dim=-1, eps=1e-8).mean()
    images = F.cosine_similarity(clean.mean(1), x_1.mean(1), dim=-1, eps=1e-8)
    consistency = over_active(1 - images)
    terms = torch.stack((velocity_term, semantic, cosine, consistency))
    if published:
        terms = torch.minimum(terms, terms.new_tensor((100.0, 100.0, 2.0, 2.0))).clamp(min=0)
    total = (terms * terms.new_tensor(weights)).sum()
    if published:
        total = total.clamp(max=100.0)
    return LossTerms(total, *(term.detach() for term in terms.unbind()))
