"""The gated activation of the MLP, on its packed projection."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._cuda import dtype_refusal
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Backward, Op
from blip3o_fast.ops._registration import register


def swiglu(gate_up: Tensor, *, impl: Impl | None = None) -> Tensor:
    """``silu(gate) * up`` (arXiv:2002.05202).

    Args:
        gate_up: ``[..., 2I]``, gate in the first half, any strides.
        impl: None chooses by device.

    Returns:
        ``[..., I]`` in the dtype of ``gate_up``. Differentiable once.
    """
    return SWIGLU(gate_up, impl=impl)


def _require(gate_up: Tensor) -> None:
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: expected an even last axis [..., 2I], got {list(gate_up.shape)}"
        )


SWIGLU = register(
    Op(
        name="swiglu",
        schema="(Tensor gate_up) -> Tensor",
        axes={"gate_up": "..."},
        reference=reference.swiglu,
        specimens=lambda sizes: [(sizes.rows(2 * sizes.inner),)],
        fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
        require=_require,
        backward=Backward("(Tensor grad, Tensor gate_up) -> Tensor"),
        quantised=True,
        cuda=dtype_refusal,
    )
)
