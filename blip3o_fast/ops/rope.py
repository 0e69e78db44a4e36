"""Rotary positions on the packed query, key and value projection."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    impl: Impl | None = None,
) -> Tensor:
    """Rotate the query and key heads of a packed projection; value heads pass through.

    With j = i + d/2: ``q[i] cos[i] - q[j] sin[i]`` and ``q[j] cos[j] + q[i] sin[j]``. The halves
    of a table may differ (the published layout is a shear), so the adjoint is not "negate sin".

    Args:
        qkv: ``[B, N, (H + 2K) d]``: H query heads, K key heads, K value heads.
        cos, sin: ``[N, d]``.
        num_heads: H.
        num_kv_heads: K; 0 when ``qkv`` holds queries alone, ``[B, N, H d]``.
        impl: None chooses by device.

    Returns:
        A new tensor of the shape and dtype of ``qkv``. Differentiable once in ``qkv``.
    """
    check_shape("cos", cos, "N d")
    N, d = cos.shape
    check_shape("sin", sin, "N d", N=N, d=d)
    check_shape("qkv", qkv, "B N W", N=N, W=(num_heads + 2 * num_kv_heads) * d)
    resolve_impl(impl, qkv)
    return reference.rope(qkv, cos, sin, num_heads, num_kv_heads)
