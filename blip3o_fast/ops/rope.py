"""Rotary positions on the packed query, key and value projection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops import _aten
from blip3o_fast.ops._cuda import dtype_refusal
from blip3o_fast.ops._dispatch import Impl, choose, outside_autocast
from blip3o_fast.ops._record import Arguments, Backward, Op
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
    arguments = (qkv, cos, sin, turned + num_kv_heads, 0, turned)
    if not inplace:
        return ROPE(*arguments, impl=impl, checked=True)[0].flatten(2)
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise ValueError("inplace: expected torch.no_grad() or a qkv that needs no gradient")
    impl = choose(ROPE, impl, qkv)
    if impl is Impl.REFERENCE:
        return qkv.copy_(ROPE(*arguments, impl=impl, checked=True)[0].flatten(2))
    if impl is Impl.ATEN:
        with outside_autocast(qkv):
            return _aten.rope(qkv, cos, sin, turned, inplace=True)
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


def split_heads(packed: Tensor, d: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[B, N, heads, d]`` of packed rows; queries alone if K is 0."""
    rows = packed.unflatten(-1, (heads + 2 * kv_heads, d))
    return rows.split((heads, kv_heads, kv_heads), dim=2) if kv_heads else (rows,)


def _split(rotate: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Callable[..., Any]:
    """The op by a function that leaves all heads packed."""

    def rotated(
        qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, turned: int
    ) -> tuple[Tensor, ...]:
        return split_heads(rotate(qkv, cos, sin, turned), cos.shape[1], heads, kv_heads)

    return rotated


def _specimens(sizes: Sizes) -> list[Arguments]:
    H, K, d = sizes.heads, sizes.kv_heads, sizes.head_width
    return [
        (sizes.rows((H + 2 * K) * d), *sizes.rotation(), H, K, H + K),
        (sizes.rows((H + 2 * K) * d), *sizes.shear(), H + 2 * K, 0, H + K),
    ]


def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, turned: int
) -> tuple[Tensor, ...]:
    del sin, turned
    (B, N, _), d = qkv.shape, cos.shape[1]
    return tuple(qkv.new_empty(B, N, count, d) for count in (heads, kv_heads, kv_heads))


def _backward_fake(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    turned: int,
) -> Tensor:
    del cos, sin, turned
    given = next(x for x in (dq, dk, dv) if x is not None)
    B, N, _, d = given.shape
    return given.new_empty(B, N, (heads + 2 * kv_heads) * d)


_GIVEN = "Tensor cos, Tensor sin, int heads, int kv_heads, int turned"

ROPE = register(
    Op(
        name="rope",
        schema=f"(Tensor qkv, {_GIVEN}) -> (Tensor, Tensor, Tensor)",
        axes={"qkv": "B N W", "cos": "N d", "sin": "N d"},
        reference=_split(lambda qkv, cos, sin, turned: reference.rope(qkv, cos, sin, turned, 0)),
        specimens=_specimens,
        fake=_fake,
        backward=Backward(
            f"(Tensor? dq, Tensor? dk, Tensor? dv, {_GIVEN}) -> Tensor",
            saved=lambda arguments, _: arguments[1:],
            results=3,
            fake=_backward_fake,
        ),
        inplace=True,
        aten=_split(_aten.rope),
        cuda=dtype_refusal,
    )
)
"""Three results ``[B, N, h, d]`` of ``heads``, ``kv_heads`` and ``kv_heads`` heads h, in order.

The first ``turned`` of all heads turn. Attention takes queries, keys and values apart, and so the
backward pass reads three gradients where attention left them: nothing has to join them. With no
``kv_heads`` all heads are in the first result, packed. In place they always stay packed.
"""
