"""The gated activation of the MLP, on its packed projection."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._dispatch import Impl, resolve_impl


def swiglu(gate_up: Tensor, *, impl: Impl | None = None) -> Tensor:
    """``silu(gate) * up`` (arXiv:2002.05202).

    Args:
        gate_up: ``[..., 2I]``, gate in the first half.
        impl: None chooses by device.

    Returns:
        ``[..., I]`` in the dtype of ``gate_up``. Differentiable once.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: expected an even last axis [..., 2I], got {list(gate_up.shape)}"
        )
    resolve_impl(impl, gate_up)
    return reference.swiglu(gate_up)
