"""LayerNorm and GELU of one adapter layer, on rows padded to a width that GEMMs like."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl


def adapter_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, impl: Impl | None = None
) -> Tensor:
    """``gelu(layer_norm(x[..., :W]))`` with the padding ``x[..., W:]`` written as zeros.

    The adapter's widths (3541, 2986, 1877, 1322 for base) are not multiples of 8, so 16-bit GEMMs
    on them leave the tensor cores' fast path; its activations are therefore stored padded.

    Args:
        x: ``[B, N, P]`` with P >= W.
        weight, bias: ``[W]``.
        eps: added to the variance.
        impl: None chooses by device.

    Returns:
        ``[B, N, P]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    check_shape("x", x, "B N P")
    check_shape("weight", weight, "W")
    check_shape("bias", bias, "W", W=weight.shape[0])
    if weight.shape[0] > x.shape[-1]:
        raise ValueError(
            f"weight: expected at most {x.shape[-1]} entries, the padded width of x, "
            f"got {weight.shape[0]}"
        )
    resolve_impl(impl, x)
    return reference.adapter_norm(x, weight, bias, eps)
