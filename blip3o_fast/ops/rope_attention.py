"""Rotary positions and the attention after them, for inference, by one kernel or by two."""

from dataclasses import replace

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._cuda import dtype_refusal
from blip3o_fast.ops._dispatch import Impl, choose
from blip3o_fast.ops._record import Arguments, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes
from blip3o_fast.ops.attention import attention, check_heads
from blip3o_fast.ops.rope import ROPE, check_rotation, rope, split_heads

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
    """``rope``, then ``attention``.

    Args:
        qkv: ``[B, N, (H + 2K) d]`` for self-attention; ``[B, N, H d]`` beside ``kept``.
        cos, sin: ``[N, d]``, as for ``rope``.
        num_heads: H.
        num_kv_heads: K of ``qkv``; 0 beside ``kept``.
        kept: keys and values ``[B, M, K, d]`` of cross-attention, already rotated.
        dropout: probability of dropping an attention weight; only with two kernels.
        impl: CUDA runs one kernel that does both, for 16-bit heads of width 64 and no gradient. Any
            other runs two: ``rope`` by that implementation, then ``attention``. None runs one
            kernel where that was measured to be faster, and two otherwise.
        rope_impl: of ``rope`` where two kernels run; None is ``impl``.
        inplace: ``qkv`` may be overwritten, as by ``rope``.

    Returns:
        ``[B, N, H d]`` in the dtype of ``qkv``. Two kernels are differentiable once, one is not.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or ``impl`` that cannot run.
    """
    if (kept is None) == (num_kv_heads == 0):
        raise ValueError(
            "num_kv_heads: expected keys and values in qkv or kept, and not in both, "
            f"got {num_kv_heads} key heads and kept={'None' if kept is None else 'given'}"
        )
    if impl in (None, Impl.CUDA) and choose(ROPE_ATTENTION, impl, qkv) is Impl.CUDA:
        check_rotation(qkv, cos, sin, num_heads, num_kv_heads)
        heads = split_heads(qkv, cos.shape[1], num_heads, num_kv_heads)
        q, k, v = heads if kept is None else (heads[0], *kept)
        unfit = _unfit(q, k, v, dropout)
        if not unfit:
            check_heads(q, k, v)
            arguments = (q, k, v, cos, sin, kept is None)
            return ROPE_ATTENTION(*arguments, impl=Impl.CUDA, checked=True).flatten(2)
        if impl is Impl.CUDA:
            raise ValueError(
                f"impl=CUDA: {unfit}; pass another for two kernels, rope and attention"
            )
    if inplace:
        turned = rope(
            *(qkv, cos, sin),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            impl=rope_impl or impl,
            inplace=True,
        )
        heads = split_heads(turned, cos.shape[1], num_heads, num_kv_heads)
    else:
        check_rotation(qkv, cos, sin, num_heads, num_kv_heads)
        arguments = (qkv, cos, sin, num_heads, num_kv_heads, num_heads + num_kv_heads)
        heads = ROPE(*arguments, impl=rope_impl or impl, checked=True)
    q, k, v = heads if kept is None else (heads[0], *kept)
    return attention(q, k, v, dropout=dropout).flatten(2)


def _unfit(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> str | None:
    """Why the one kernel cannot compute this, or None."""
    if dropout:
        return "the kernel drops nothing: expected dropout=0"
    if q.shape[-1] != WIDTH:
        return f"the kernel takes heads of {WIDTH}, got {q.shape[-1]}"
    if q.numel() and not k.shape[1]:
        return "the kernel needs at least one key"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "the kernel has no backward: expected torch.no_grad()"
    return None


def _cuda_refusal(x: Tensor) -> str | None:
    if x.dtype is torch.float32:
        return "tensor cores take float16 and bfloat16"
    return dtype_refusal(x)


def _specimens(sizes: Sizes) -> list[Arguments]:
    sizes = replace(sizes, head_width=WIDTH)
    H, K = sizes.heads, sizes.kv_heads
    heads = sizes.rows((H + 2 * K) * WIDTH).unflatten(-1, (-1, WIDTH))
    q, k, v = heads.split((H, K, K), dim=2)
    return [(q, k, v, *sizes.rotation(), True), (q, k, v, *sizes.shear(), False)]


def _flops(q: Tensor, k: Tensor, *others: object) -> float:
    """Two matrix products of queries and keys, two flops for each multiply-add."""
    del others
    return 4.0 * q.numel() * k.shape[1]


ROPE_ATTENTION = register(
    Op(
        name="rope_attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool rotates_keys) -> "
        "Tensor",
        axes={"q": "B N H d", "k": "B M K d", "v": "B M K d", "cos": "N d", "sin": "N d"},
        reference=reference.rope_attention,
        specimens=_specimens,
        triton=None,
        cuda=_cuda_refusal,
        combines=True,
        flops=_flops,
    )
)
