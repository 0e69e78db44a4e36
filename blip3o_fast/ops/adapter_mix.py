"""The gated sum of the adapter's two paths."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Backward, Op
from blip3o_fast.ops._registration import register


def adapter_mix(
    gate: Tensor, adapted: Tensor, residual: Tensor, *, impl: Impl | None = None
) -> Tensor:
    """``sigmoid(gate) * adapted + (1 - sigmoid(gate)) * residual``.

    Args:
        gate: logits ``[B, N, D]``, any strides.
        adapted, residual: the MLP path and the linear path, ``[B, N, D]``, any strides.
        impl: None chooses by device.

    Returns:
        ``[B, N, D]`` in the dtype of ``gate``. Differentiable once in every tensor.
    """
    return ADAPTER_MIX(gate, adapted, residual, impl=impl)


_GIVEN = "Tensor gate, Tensor adapted, Tensor residual"

ADAPTER_MIX = register(
    Op(
        name="adapter_mix",
        schema=f"({_GIVEN}) -> Tensor",
        axes=dict.fromkeys(("gate", "adapted", "residual"), "B N D"),
        reference=reference.adapter_mix,
        specimens=lambda sizes: [tuple(sizes.rows(sizes.width) for _ in range(3))],
        backward=Backward(f"(Tensor grad, {_GIVEN}) -> (Tensor, Tensor, Tensor)"),
    )
)
