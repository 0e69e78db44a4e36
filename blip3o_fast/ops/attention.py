"""Grouped-query attention without repeated keys and values."""

from functools import lru_cache

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.ops._attention_backends import (
    CHAIN,
    AttentionBackend,
    Facts,
    refusal,
    run,
)
from blip3o_fast.ops._dispatch import check_tensors, outside_autocast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` with K key and value heads shared by H query heads.

    Under autocast the inputs are cast to its dtype, like those of a matrix product.

    Args:
        q: ``[B, N, H, d]``, any strides; with a contiguous last axis it is read where it lies.
        k, v: ``[B, M, K, d]``; K divides H. Same dtype and device as ``q``.
        dropout: probability of dropping an attention weight.
        backend: None chooses, as ``attention_backend`` tells.

    Returns:
        ``[B, N, H, d]`` in the dtype of ``q``. Differentiable in every tensor.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    q, k, v = _as_autocast(q, k, v)
    check_heads(q, k, v)
    _check_dropout(dropout)
    chosen = _choose(_facts(q, k, v, dropout), backend)[0]
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
    return _choose(_facts(q, k, v, dropout), backend)


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


def _facts(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Facts:
    return Facts(
        device=q.device,
        dtype=q.dtype,
        width=q.shape[-1],
        dropout=dropout > 0,
        unit_rows=all(x.stride(-1) == 1 for x in (q, k, v)),
        empty=not (q.numel() and k.numel()),
        compiling=torch.compiler.is_compiling(),
    )


def _choose(facts: Facts, backend: AttentionBackend | None) -> tuple[AttentionBackend, str]:
    if backend is None:
        return _first(facts) if facts.compiling else _remembered(facts)
    reason = refusal(backend, facts)
    if reason is not None:
        raise ValueError(
            f"backend={backend.name} on {facts.dtype} heads of {facts.width} on {facts.device}: "
            f"{reason}; pass backend=None to choose one that can run"
        )
    return backend, "asked for"


def _first(facts: Facts) -> tuple[AttentionBackend, str]:
    """The first backend of the chain that can run, and what spoke against those before it."""
    passed: dict[str, list[str]] = {}
    for candidate in CHAIN:
        reason = refusal(candidate, facts)
        if reason is None:
            why = [f"not {', '.join(names)}: {reason}" for reason, names in passed.items()]
            return candidate, "; ".join(why) or "first choice"
        passed.setdefault(reason, []).append(candidate.value)
    raise AssertionError("SDPA takes everything")


_remembered = lru_cache(maxsize=256)(_first)
