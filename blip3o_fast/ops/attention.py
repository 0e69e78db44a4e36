"""Grouped-query attention without repeated keys and values."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from blip3o_fast.axes import check_shape
from blip3o_fast.ops._attention_backends import AttentionBackend, choose, order_of, run
from blip3o_fast.ops._dispatch import check_tensors, outside_autocast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``, where H query heads share K key and value heads.

    Under autocast the inputs are cast to its dtype, as for a matrix product.

    Args:
        q: ``[B, N, H, d]``, any strides. If the last axis is contiguous, nothing is copied.
        k, v: ``[B, M, K, d]``; K divides H. Same dtype and device as ``q``.
        dropout: probability of dropping an attention weight.
        backend: None chooses; ``attention_backend`` tells which and why.

    Returns:
        ``[B, N, H, d]`` in the dtype of ``q``. Differentiable in every tensor.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    q, k, v = _as_autocast(q, k, v)
    check_heads(q, k, v)
    _check_dropout(dropout)
    chosen, _ = choose(backend, q, k, v, dropout)
    with outside_autocast(q):
        return run(chosen, q, k, v, dropout)


def attention_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    backend: AttentionBackend | None = None,
) -> tuple[AttentionBackend, str]:
    """The backend that ``attention`` would use for these arguments, and why.

    Raises:
        ValueError: as ``attention``.
    """
    q, k, v = _as_autocast(q, k, v)
    check_heads(q, k, v)
    _check_dropout(dropout)
    chosen, passed = choose(backend, q, k, v, dropout)
    if backend is not None:
        return chosen, "asked for"
    why = [f"not {', '.join(names)}: {reason}" for reason, names in passed.items()]
    if chosen is AttentionBackend.SDPA:
        why.append(f"torch would use {_kernel_of_sdpa(q, k, v, dropout)}")
    order = order_of(q, k, v)
    if order.why:
        basis = f"measured in {order.measured}" if order.measured else "not measured"
        why.append(f"the order is {basis}: {order.why}")
    return chosen, "; ".join(why) or "first choice"


def _kernel_of_sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> str:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    choice = torch.ops.aten._fused_sdp_choice(*heads, dropout_p=dropout, enable_gqa=grouped)
    return SDPBackend(choice).name


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` unless these are queries, keys and values of one attention."""
    check_shape("q", q, "B N H d")
    B, _, H, d = q.shape
    check_shape("k", k, "B M K d", B=B, d=d)
    check_shape("v", v, "B M K d", B=B, M=k.shape[1], K=k.shape[2], d=d)
    if not k.shape[2] or H % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides {H}, got {k.shape[2]}")
    check_tensors(q=q, k=k, v=v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected {q.dtype}, the dtype of q, got {x.dtype}")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
