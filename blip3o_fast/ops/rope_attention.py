"""Rotary positions and the attention that follows them, in inference: one kernel or two."""

import torch
from torch import Tensor

from blip3o_fast.ops._dispatch import Impl, operators, resolve_impl
from blip3o_fast.ops.attention import attention, check_heads
from blip3o_fast.ops.rope import check_rotation, rope

WIDTH = 64
"""The head width of the kernel: that of every published size."""


def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    kept: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    impl: Impl | None = None,
    rope_impl: Impl | None = None,
    inplace: bool = False,
) -> Tensor:
    """``attention`` of heads that ``rope`` has rotated.

    Args:
        qkv: ``[B, N, (H + 2K) d]`` for self-attention; ``[B, N, H d]`` beside ``kept``.
        cos, sin: ``[N, d]``, as for ``rope``.
        num_heads: H.
        num_kv_heads: K of ``qkv``; 0 beside ``kept``.
        kept: keys and values ``[B, M, K, d]`` of cross-attention, where they are rotated already.
        dropout: probability of dropping an attention weight; needs two kernels.
        impl: CUDA is one kernel that rotates on the way to attention, for 16-bit heads of 64 and no
            gradient. Any other is two: ``rope`` by that implementation, then ``attention``. None is
            one where that was measured faster, else two.
        rope_impl: of ``rope``, where ``impl`` is None and there are two.
        inplace: ``qkv`` may be overwritten, as by ``rope``.

    Returns:
        ``[B, N, H d]`` in the dtype of ``qkv``. Differentiable once, but not by the one kernel.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or ``impl`` that cannot run.
    """
    if (kept is None) == (num_kv_heads == 0):
        raise ValueError(
            "num_kv_heads: expected keys and values in qkv or kept, and not in both, "
            f"got {num_kv_heads} key heads and kept={'None' if kept is None else 'given'}"
        )
    if _is_one_kernel(impl, qkv, cos, sin, num_heads, num_kv_heads, kept, dropout):
        q, k, v = _heads(qkv, cos.shape[1], num_heads, kept)
        check_heads(q, k, v)
        return operators(Impl.CUDA).rope_attention(q, k, v, cos, sin, kept is None).flatten(2)
    turned = rope(
        *(qkv, cos, sin),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        impl=rope_impl if impl is None else impl,
        inplace=inplace,
    )
    heads = _heads(turned, cos.shape[1], num_heads, kept)
    return attention(*heads, dropout=dropout).flatten(2)


def _heads(
    qkv: Tensor, d: int, num_heads: int, kept: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(-1, (-1, d))
    if kept is not None:
        return heads, *kept
    K = (heads.shape[2] - num_heads) // 2
    return heads.split((num_heads, K, K), dim=2)


def _is_one_kernel(
    impl: Impl | None,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    kept: tuple[Tensor, Tensor] | None,
    dropout: float,
) -> bool:
    if impl not in (None, Impl.CUDA):
        return False
    if resolve_impl(impl, qkv, op="rope_attention") is not Impl.CUDA:
        return False
    check_rotation(qkv, cos, sin, num_heads, num_kv_heads)  # of two kernels rope checks it
    unfit = _unfit(qkv, cos.shape[1], kept, dropout)
    if unfit and impl is Impl.CUDA:
        raise ValueError(f"impl=CUDA: {unfit}; pass another for two kernels, rope and attention")
    return not unfit


def _unfit(qkv: Tensor, d: int, kept: tuple[Tensor, Tensor] | None, dropout: float) -> str | None:
    """Why the one kernel cannot compute this, or None."""
    if dropout:
        return "the kernel drops nothing: expected dropout=0"
    if d != WIDTH:
        return f"the kernel takes heads of {WIDTH}, got {d}"
    if kept is not None and not kept[0].shape[1]:
        return "the kernel needs at least one key"
    tensors = (qkv, *(kept or ()))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "the kernel has no backward: expected torch.no_grad()"
    return None
