"""Forward passes for a CPU: ``reference`` in as few passes over memory as ATen's operators allow.

A fused kernel reads a row once. ATen reads it once an operator, and in 16-bit dtypes the reference
has some thirty of them in a join; here there are about ten, all in the accumulation dtype, rounded
once at the end. Both norms of a site need one scale a row, as in the fused kernels: with
``p = w1 x`` and ``r = rsqrt(mean x^2 + eps)``,

    rms(rms(x; w1); w2) = w2 p * r rsqrt(r^2 mean p^2 + eps)

No backward: buffers are overwritten as soon as their values are used up.
"""

import torch
from torch import Tensor

from blip3o_fast.reference import Modulation, accumulation_dtype

OPS = frozenset(("sandwich_norm", "sandwich_join", "rope"))
"""The ops that have a forward pass here."""


def sandwich_norm(x: Tensor, norm: Modulation, eps: float) -> Tensor:
    """``ops.sandwich_norm``."""
    return _modulated(x.to(accumulation_dtype(x.dtype)), norm, eps).to(x.dtype)


def sandwich_join(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """``ops.sandwich_join``."""
    wide = accumulation_dtype(x.dtype)
    branch = y.to(wide) if layer_scale is None else y.to(wide) * layer_scale.to(wide)
    stream = x + branch if post is None else _modulated(branch, post, eps).add_(x)
    h = None if pre is None else _modulated(stream, pre, eps).to(x.dtype)
    return stream.to(x.dtype), h


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, turned: int, inplace: bool) -> Tensor:
    """``ops.rope`` of the first ``turned`` heads."""
    d = cos.shape[-1]
    wide = accumulation_dtype(qkv.dtype)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    heads = qkv[..., : turned * d].unflatten(-1, (turned, d))
    low, high = heads.to(wide).chunk(2, dim=-1)
    rotated = heads * cos
    rotated[..., : d // 2].addcmul_(high, sin[..., : d // 2], value=-1)
    rotated[..., d // 2 :].addcmul_(low, sin[..., d // 2 :])
    out = qkv if inplace else torch.empty_like(qkv)
    out[..., : turned * d].unflatten(-1, (turned, d)).copy_(rotated)
    if not inplace:
        out[..., turned * d :] = qkv[..., turned * d :]
    return out


def _modulated(x: Tensor, norm: Modulation, eps: float) -> Tensor:
    """Both norms and the modulation of ``x``, which is wide; a new tensor."""
    w1, w2, shift, scale = (u.to(x.dtype) for u in norm)
    p = x * w1
    r = torch.rsqrt(_mean_square(x) + eps)
    p *= r * torch.rsqrt(r.square() * _mean_square(p) + eps)
    return torch.addcmul(shift[:, None], p, (w2 * (1 + scale))[:, None])


def _mean_square(x: Tensor) -> Tensor:
    # The one reduction of ATen that squares as it reads.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
