"""The gated sum of the adapter's two paths."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl


def adapter_mix(
    gate: Tensor, adapted: Tensor, residual: Tensor, *, impl: Impl | None = None
) -> Tensor:
    """``sigmoid(gate) * adapted + (1 - sigmoid(gate)) * residual``.

    Args:
        gate: logits ``[B, N, D]``.
        adapted, residual: the MLP path and the linear path, ``[B, N, D]``.
        impl: None chooses by device.

    Returns:
        ``[B, N, D]`` in the dtype of ``gate``. Differentiable once in every tensor.
    """
    check_shape("gate", gate, "B N D")
    B, N, D = gate.shape
    check_shape("adapted", adapted, "B N D", B=B, N=N, D=D)
    check_shape("residual", residual, "B N D", B=B, N=N, D=D)
    resolve_impl(impl, gate)
    return reference.adapter_mix(gate, adapted, residual)
