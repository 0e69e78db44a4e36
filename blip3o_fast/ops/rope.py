"""Rotary positions on the packed query, key and value projection."""

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops import _aten
from blip3o_fast.ops._cuda import dtype_refusal
from blip3o_fast.ops._dispatch import Impl, choose, outside_autocast
from blip3o_fast.ops._record import Arguments, Backward, Op, like_first
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes


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

    With j = i + d/2: ``q[i] cos[i] - q[j] sin[i]`` and ``q[j] cos[j] + q[i] sin[j]``. The halves of
    a table may differ, as in the published layout, which is a shear.

    Args:
        qkv: ``[B, N, (H + 2K) d]``: H query heads, K key heads, K value heads; any strides.
        cos, sin: ``[N, d]``, d even. They may be fp32 beside a 16-bit ``qkv``.
        num_heads: H; 0 if ``qkv`` holds keys and values only, ``[B, N, 2 K d]``.
        num_kv_heads: K; 0 if ``qkv`` holds queries only, ``[B, N, H d]``.
        impl: None chooses by device.
        inplace: overwrite ``qkv`` and return it. Not possible if a gradient is recorded.

    Returns:
        A tensor of the shape and dtype of ``qkv``, new unless ``inplace``. Differentiable once in
        ``qkv``.
    """
    check_rotation(qkv, cos, sin, num_heads, num_kv_heads)
    turned = num_heads + num_kv_heads
    if not inplace:
        return ROPE(qkv, cos, sin, turned, impl=impl, checked=True)
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("inplace: expected torch.no_grad() or a qkv that needs no gradient")
    impl = choose(ROPE, impl, qkv)
    if impl is Impl.REFERENCE:
        return qkv.copy_(ROPE(qkv, cos, sin, turned, impl=impl, checked=True))
    if impl is Impl.ATEN:
        with outside_autocast(qkv):
            return _aten.rope(qkv, cos, sin, turned, inplace=True)
    arguments = (qkv, cos, sin, turned)
    ROPE.fused[impl].find("forward_", arguments)(*arguments)
    return qkv


def check_rotation(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> None:
    """Raise ``ValueError`` unless these are packed heads and their tables."""
    if num_heads < 0 or num_kv_heads < 0 or num_heads + num_kv_heads < 1:
        raise ValueError(
            f"num_heads, num_kv_heads: expected heads, got {num_heads}, {num_kv_heads}"
        )
    ROPE.check(qkv, cos, sin)
    N, d = cos.shape
    if d % 2:
        raise ValueError(f"cos: expected an even head width d, got {d}")
    width = (num_heads + 2 * num_kv_heads) * d
    if qkv.shape[2] != width:
        check_shape("qkv", qkv, "B N W", N=N, W=width)


def _specimens(sizes: Sizes) -> list[Arguments]:
    H, K, d = sizes.heads, sizes.kv_heads, sizes.head_width
    return [
        (sizes.rows((H + 2 * K) * d), *sizes.rotation(), H + K),
        (sizes.rows(H * d), *sizes.shear(), H),
    ]


_TABLES = "Tensor cos, Tensor sin, int heads"

ROPE = register(
    Op(
        name="rope",
        schema=f"(Tensor qkv, {_TABLES}) -> Tensor",
        axes={"qkv": "B N W", "cos": "N d", "sin": "N d"},
        reference=lambda qkv, cos, sin, heads: reference.rope(qkv, cos, sin, heads, 0),
        specimens=_specimens,
        backward=Backward(
            f"(Tensor grad, {_TABLES}) -> Tensor",
            saved=lambda arguments, _: arguments[1:],
            fake=like_first,
        ),
        inplace=True,
        aten=_aten.rope,
        cuda=dtype_refusal,
    )
)
