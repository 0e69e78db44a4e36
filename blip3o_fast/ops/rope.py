"""Rotary positions on the packed query, key and value projection."""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops import _aten
from blip3o_fast.ops._autograd import once_differentiable
from blip3o_fast.ops._dispatch import (
    Impl,
    check_tensors,
    operators,
    outside_autocast,
    resolve_impl,
)


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    impl: Impl | None = None,
    inplace: bool = False,
) -> Tensor:
    """Rotate the query and key heads of a packed projection; value heads pass through.

    With j = i + d/2: ``q[i] cos[i] - q[j] sin[i]`` and ``q[j] cos[j] + q[i] sin[j]``. The halves
    of a table may differ (the published layout is a shear), so the adjoint is not "negate sin".

    Args:
        qkv: ``[B, N, (H + 2K) d]``: H query heads, K key heads, K value heads; any strides.
        cos, sin: ``[N, d]``, d even; fp32 tables keep their precision beside a 16-bit ``qkv``.
        num_heads: H; 0 when ``qkv`` holds keys and values alone, ``[B, N, 2 K d]``.
        num_kv_heads: K; 0 when ``qkv`` holds queries alone, ``[B, N, H d]``.
        impl: None chooses by device.
        inplace: overwrite ``qkv`` and return it, which leaves the values where they are. For
            inference: refused where a gradient is being recorded.

    Returns:
        A tensor of the shape and dtype of ``qkv``, new unless ``inplace``. Differentiable once in
        ``qkv``.
    """
    check_rotation(qkv, cos, sin, num_heads, num_kv_heads)
    if inplace and torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("inplace: expected torch.no_grad() or a qkv that needs no gradient")
    turned = num_heads + num_kv_heads
    impl = resolve_impl(impl, qkv, op="rope")
    if impl is Impl.REFERENCE:
        with outside_autocast(qkv):
            result = reference.rope(qkv, cos, sin, num_heads, num_kv_heads)
        return qkv.copy_(result) if inplace else result
    if impl is Impl.ATEN:
        with outside_autocast(qkv):
            return _aten.rope(qkv, cos, sin, turned, inplace)
    if inplace:
        operators(impl).rope_(qkv, cos, sin, turned)
        return qkv
    return _RoPE.apply(qkv, cos, sin, turned, impl)


def check_rotation(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> None:
    """Raise ``ValueError`` unless these are packed heads and their tables."""
    check_shape("cos", cos, "N d")
    N, d = cos.shape
    if d % 2:
        raise ValueError(f"cos: expected an even head width d, got {d}")
    if num_heads < 0 or num_kv_heads < 0 or num_heads + num_kv_heads < 1:
        raise ValueError(
            f"num_heads, num_kv_heads: expected heads, got {num_heads}, {num_kv_heads}"
        )
    check_shape("sin", sin, "N d", N=N, d=d)
    check_shape("qkv", qkv, "B N W", N=N, W=(num_heads + 2 * num_kv_heads) * d)
    check_tensors(qkv=qkv, cos=cos, sin=sin)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, impl: Impl) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.impl = heads, impl
        return operators(impl).rope(qkv, cos, sin, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return operators(ctx.impl).rope_backward(grad, cos, sin, ctx.heads), *(None,) * 4


_TABLES = "Tensor cos, Tensor sin, int heads"
torch.library.define("blip3o_fast::rope", f"(Tensor qkv, {_TABLES}) -> Tensor")
torch.library.define("blip3o_fast::rope_", f"(Tensor(a!) qkv, {_TABLES}) -> ()")
torch.library.define("blip3o_fast::rope_backward", f"(Tensor grad, {_TABLES}) -> Tensor")


@torch.library.impl("blip3o_fast::rope", ("cpu", "cuda"))
def _forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    from blip3o_kernels import rope as kernels

    return kernels.forward(qkv, cos, sin, heads)


@torch.library.impl("blip3o_fast::rope_", ("cpu", "cuda"))
def _forward_inplace(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    from blip3o_kernels import rope as kernels

    kernels.forward_(qkv, cos, sin, heads)


@torch.library.impl("blip3o_fast::rope_backward", ("cpu", "cuda"))
def _backward(grad: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    from blip3o_kernels import rope as kernels

    return kernels.backward(grad, cos, sin, heads)


@torch.library.register_fake("blip3o_fast::rope")
def _forward_fake(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    del cos, sin, heads
    return qkv.new_empty(qkv.shape)


@torch.library.register_fake("blip3o_fast::rope_")
def _forward_inplace_fake(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    del qkv, cos, sin, heads


@torch.library.register_fake("blip3o_fast::rope_backward")
def _backward_fake(grad: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    del cos, sin, heads
    return grad.new_empty(grad.shape)
