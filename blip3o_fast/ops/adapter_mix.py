"""The gated sum of the adapter's two paths."""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._autograd import once_differentiable
from blip3o_fast.ops._dispatch import (
    Impl,
    check_tensors,
    outside_autocast,
    resolve_impl,
)


def adapter_mix(
    gate: Tensor,
    adapted: Tensor,
    residual: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """``sigmoid(gate) * adapted + (1 - sigmoid(gate)) * residual``.

    Args:
        gate: logits ``[B, N, D]``, any strides.
        adapted, residual: the MLP path and the linear path, ``[B, N, D]``, any strides.
        impl: None chooses by device.

    Returns:
        ``[B, N, D]`` in the dtype of ``gate``. Differentiable once in every tensor.
    """
    check_shape("gate", gate, "B N D")
    B, N, D = gate.shape
    check_shape("adapted", adapted, "B N D", B=B, N=N, D=D)
    check_shape("residual", residual, "B N D", B=B, N=N, D=D)
    check_tensors(gate=gate, adapted=adapted, residual=residual)
    if resolve_impl(impl, gate, op="adapter_mix") is Impl.REFERENCE:
        with outside_autocast(gate):
            return reference.adapter_mix(gate, adapted, residual)
    return _AdapterMix.apply(gate, adapted, residual)


class _AdapterMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, adapted: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(gate, adapted, residual)
        return torch.ops.blip3o_fast.adapter_mix(gate, adapted, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.blip3o_fast.adapter_mix_backward(grad, *ctx.saved_tensors)


_PATHS = "Tensor gate, Tensor adapted, Tensor residual"
torch.library.define("blip3o_fast::adapter_mix", f"({_PATHS}) -> Tensor")
torch.library.define(
    "blip3o_fast::adapter_mix_backward", f"(Tensor grad, {_PATHS}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl("blip3o_fast::adapter_mix", ("cpu", "cuda"))
def _forward(gate: Tensor, adapted: Tensor, residual: Tensor) -> Tensor:
    from blip3o_kernels import adapter_mix as kernels

    return kernels.forward(gate, adapted, residual)


@torch.library.impl("blip3o_fast::adapter_mix_backward", ("cpu", "cuda"))
def _backward(
    grad: Tensor, gate: Tensor, adapted: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from blip3o_kernels import adapter_mix as kernels

    return kernels.backward(grad, gate, adapted, residual)


@torch.library.register_fake("blip3o_fast::adapter_mix")
def _forward_fake(gate: Tensor, adapted: Tensor, residual: Tensor) -> Tensor:
    del adapted, residual
    return gate.new_empty(gate.shape)


@torch.library.register_fake("blip3o_fast::adapter_mix_backward")
def _backward_fake(
    grad: Tensor, gate: Tensor, adapted: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    del grad
    return (
        gate.new_empty(gate.shape),
        adapted.new_empty(adapted.shape),
        residual.new_empty(residual.shape),
    )
