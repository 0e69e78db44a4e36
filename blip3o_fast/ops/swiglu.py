"""The gated activation of the MLP, on its packed projection."""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._autograd import once_differentiable
from blip3o_fast.ops._dispatch import (
    Impl,
    check_tensors,
    operators,
    outside_autocast,
    resolve_impl,
)


def swiglu(gate_up: Tensor, *, impl: Impl | None = None) -> Tensor:
    """``silu(gate) * up`` (arXiv:2002.05202).

    Args:
        gate_up: ``[..., 2I]``, gate in the first half, any strides.
        impl: None chooses by device.

    Returns:
        ``[..., I]`` in the dtype of ``gate_up``. Differentiable once.
    """
    check_gate_up(gate_up)
    impl = resolve_impl(impl, gate_up, op="swiglu")
    if impl is Impl.REFERENCE:
        with outside_autocast(gate_up):
            return reference.swiglu(gate_up)
    return _SwiGLU.apply(gate_up, impl)


def check_gate_up(gate_up: Tensor) -> None:
    """Raise ``ValueError`` unless ``gate_up`` is ``[..., 2I]``."""
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"gate_up: expected an even last axis [..., 2I], got {list(gate_up.shape)}"
        )
    check_tensors(gate_up=gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, impl: Impl) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.impl = impl
        return operators(impl).swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        return operators(ctx.impl).swiglu_backward(grad, gate_up), None


torch.library.define("blip3o_fast::swiglu", "(Tensor gate_up) -> Tensor")
torch.library.define("blip3o_fast::swiglu_backward", "(Tensor grad, Tensor gate_up) -> Tensor")


@torch.library.impl("blip3o_fast::swiglu", ("cpu", "cuda"))
def _forward(gate_up: Tensor) -> Tensor:
    from blip3o_kernels import swiglu as kernels

    return kernels.forward(gate_up)


@torch.library.impl("blip3o_fast::swiglu_backward", ("cpu", "cuda"))
def _backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    from blip3o_kernels import swiglu as kernels

    return kernels.backward(grad, gate_up)


@torch.library.register_fake("blip3o_fast::swiglu")
def _forward_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.register_fake("blip3o_fast::swiglu_backward")
def _backward_fake(grad: Tensor, gate_up: Tensor) -> Tensor:
    del grad
    return gate_up.new_empty(gate_up.shape)
