"""The ops on a CPU without gradients: as few passes over memory as ATen's operators allow.

Every ATen operator reads and writes whole rows. In 16-bit dtypes the reference of a join has about
thirty operators; here it has about ten. All of them compute in the accumulation dtype, and the
result is rounded once. They work in place where nobody else holds the tensor, because memory that
was just read is in cache and a new tensor is not.

Two norms in a row need one scale, as in the fused kernels. With ``p = w1 x``,

    rms(rms(x; w1); w2) = w2 p / sqrt(mean p^2 + eps (mean x^2 + eps))
"""

import math

import torch
from torch import Tensor

from blip3o_fast.reference import Modulation, accumulation_dtype

SOLVER_ELEMENTS = 1 << 18
"""How many elements of the state ``solver_update`` computes at a time: 1 MiB in fp32."""


def sandwich_norm(
    x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """``ops.sandwich_norm``."""
    wide, norm = x.to(accumulation_dtype(x.dtype)), Modulation(w1, w2, shift, scale)
    return _modulated(wide, norm, eps, overwrite=wide is not x).to(x.dtype)


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
    if post is None:
        stream = x + branch
    else:
        stream = _modulated(branch, post, eps, overwrite=branch is not y).add_(x)
    x_out = stream.to(x.dtype)
    if pre is None:
        return x_out, None
    return x_out, _modulated(stream, pre, eps, overwrite=x_out is not stream).to(x.dtype)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, turned: int, inplace: bool = False) -> Tensor:
    """``ops.rope`` of the first ``turned`` heads."""
    d = cos.shape[-1]
    half = d // 2
    wide = accumulation_dtype(qkv.dtype)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    heads = qkv[..., : turned * d].unflatten(-1, (turned, d))
    given = heads.to(wide)
    rotated = given * cos
    rotated[..., :half].addcmul_(given[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(given[..., :half], sin[..., half:])
    out = qkv if inplace else torch.empty_like(qkv)
    out[..., : turned * d].unflatten(-1, (turned, d)).copy_(rotated)
    if not inplace:
        out[..., turned * d :] = qkv[..., turned * d :]
    return out


def solver_update(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    slot: Tensor | None,
    clamp: Tensor | None,
    guidance_scale: float,
    out: Tensor,
) -> None:
    """``ops.solver_update`` into ``out``, bit by bit like the reference: it rounds each product.

    A row of ``slopes`` with coefficient zero is not read. A few samples are computed at a time, so
    that their sums stay in cache.
    """
    of_x, of_slope, *of_rows = coefficients.tolist()
    kept = -1 if slot is None else int(slot)
    bound = math.inf if clamp is None else clamp.item()
    halves = velocity.chunk(2) if guidance_scale != 1.0 else (velocity,)
    samples = max(1, SOLVER_ELEMENTS // max(1, x.shape[1:].numel()))
    for first in range(0, len(x), samples):
        part = slice(first, first + samples)
        slope, *unconditional = (half[part].to(x.dtype) for half in halves)
        for other in unconditional:
            slope = torch.sub(slope, other).mul_(guidance_scale).add_(other)
        product = torch.mul(x[part], of_x)
        total = torch.mul(slope, of_slope).add_(product)
        for coefficient, earlier in zip(of_rows, slopes[:, part], strict=True):
            if coefficient != 0:
                total.add_(torch.mul(earlier, coefficient, out=product))
        if 0 <= kept < len(slopes):
            slopes[kept, part] = slope
        out[part] = total if bound == math.inf else total.clamp_(-bound, bound)


def _modulated(x: Tensor, norm: Modulation, eps: float, *, overwrite: bool) -> Tensor:
    """Both norms and the modulation of ``x``, in its own memory if ``overwrite``."""
    w1, w2, shift, scale = (u.to(x.dtype) for u in norm)
    D = x.shape[-1]
    squares = _norm(x).square_()
    p = torch.mul(x, w1, out=x if overwrite else None)
    # sqrt(D) / sqrt(sum p^2 + eps (sum x^2 + D eps)): sums instead of means.
    p *= _norm(p).square_().add_(squares.add_(D * eps), alpha=eps).rsqrt_().mul_(D**0.5)
    gain = torch.addcmul(w2, w2, scale)
    return torch.addcmul(shift[:, None], p, gain[:, None], out=p)


def _norm(x: Tensor) -> Tensor:
    # The only reduction of ATen that squares as it reads.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
