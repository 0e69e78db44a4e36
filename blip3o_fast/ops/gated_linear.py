"""The gate and up projections of the MLP with their activation."""

import torch.nn.functional as F
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl
from blip3o_fast.ops.swiglu import swiglu


def gated_linear(x: Tensor, weight: Tensor, *, impl: Impl | None = None) -> Tensor:
    """``silu(x Wg^T) * (x Wu^T)`` (arXiv:2002.05202).

    A fused ``swiglu`` follows one product over both halves. Without one there are two products: on
    a CPU the rows of a packed fp32 result of 2I = 4096 columns lie 16 KiB apart, on the same cache
    sets, and the one product takes more than twice as long as its halves.

    Args:
        x: ``[B, N, D]``.
        weight: ``[2I, D]``, Wg over Wu.
        impl: of ``swiglu``; None chooses by device.

    Returns:
        ``[B, N, I]``, in the dtype of ``F.linear``. Differentiable in both.
    """
    check_shape("x", x, "B N D")
    check_shape("weight", weight, "W D", D=x.shape[-1])
    if weight.shape[0] % 2:
        raise ValueError(f"weight: expected an even number of rows 2I, got {weight.shape[0]}")
    if resolve_impl(impl, x, op="swiglu") is not Impl.REFERENCE:
        return swiglu(F.linear(x, weight), impl=impl)
    gate, up = weight.chunk(2)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)
