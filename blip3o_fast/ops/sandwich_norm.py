"""RMSNorm followed by AdaLN, which holds an RMSNorm of its own, as one op."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl


def sandwich_norm(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    impl: Impl | None = None,
) -> Tensor:
    """``rms(rms(x; w1); w2) * (1 + scale) + shift``.

    Args:
        x: ``[B, N, D]``, any strides with a contiguous last axis.
        w1, w2: ``[D]``, weights of the outer and of the AdaLN's own norm.
        shift, scale: ``[B, D]``, constant over tokens; chunks of one ``[B, 2D]`` need no copy.
        eps: added to both mean squares.
        impl: None chooses by device.

    Returns:
        ``[B, N, D]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    check_shape("x", x, "B N D")
    check_modulation("", w1, w2, shift, scale, batch=x.shape[0], width=x.shape[2])
    resolve_impl(impl, x)
    return reference.sandwich_norm(x, w1, w2, shift, scale, eps)


def check_modulation(
    prefix: str, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, *, batch: int, width: int
) -> None:
    """Raise ``ValueError`` unless the four tensors modulate ``[batch, N, width]``."""
    check_shape(f"{prefix}w1", w1, "D", D=width)
    check_shape(f"{prefix}w2", w2, "D", D=width)
    check_shape(f"{prefix}shift", shift, "B D", B=batch, D=width)
    check_shape(f"{prefix}scale", scale, "B D", B=batch, D=width)
