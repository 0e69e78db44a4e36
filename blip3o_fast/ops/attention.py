"""Grouped-query attention without repeated keys and values."""

from enum import Enum

import torch.nn.functional as F
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape


class AttentionBackend(Enum):
    """Where softmax attention is computed."""

    REFERENCE = "reference"
    SDPA = "sdpa"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` with K key and value heads shared by H query heads.

    Args:
        q: ``[B, N, H, d]``, any strides with a contiguous last axis.
        k, v: ``[B, M, K, d]``; K divides H.
        dropout: probability of dropping an attention weight.
        backend: None chooses.

    Returns:
        ``[B, N, H, d]`` in the dtype of ``q``.
    """
    check_shape("q", q, "B N H d")
    B, _, H, d = q.shape
    check_shape("k", k, "B M K d", B=B, d=d)
    check_shape("v", v, "B M K d", B=B, M=k.shape[1], K=k.shape[2], d=d)
    if H % k.shape[2]:
        raise ValueError(f"k: expected a number of heads that divides {H}, got {k.shape[2]}")
    if backend is AttentionBackend.REFERENCE:
        return reference.attention(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)
