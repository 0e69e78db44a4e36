"""LayerNorm and GELU of one adapter layer, on rows padded to a width that GEMMs like."""

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


def adapter_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """``gelu(layer_norm(x[..., :W]))`` with the padding ``x[..., W:]`` written as zeros.

    The adapter's widths (3541, 2986, 1877, 1322 for base) are not multiples of 8, so 16-bit GEMMs
    on them leave the tensor cores' fast path; its activations are therefore stored padded. What the
    padding of ``x`` holds is not read, and its gradient is zero.

    Args:
        x: ``[B, N, P]`` with P >= W, any strides.
        weight, bias: ``[W]``.
        eps: added to the variance.
        impl: None chooses by device.

    Returns:
        ``[B, N, P]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    check_shape("x", x, "B N P")
    check_shape("weight", weight, "W")
    W = weight.shape[0]
    check_shape("bias", bias, "W", W=W)
    if not 1 <= W <= x.shape[-1]:
        raise ValueError(
            f"weight: expected 1 to {x.shape[-1]} entries, the padded width of x, got {W}"
        )
    check_tensors(x=x, weight=weight, bias=bias)
    if resolve_impl(impl, x, op="adapter_norm") is Impl.REFERENCE:
        with outside_autocast(x):
            return reference.adapter_norm(x, weight, bias, eps)
    return _AdapterNorm.apply(x, weight, bias, eps)


class _AdapterNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return torch.ops.blip3o_fast.adapter_norm(x, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = any(ctx.needs_input_grad[1:3])
        dx, dw, db = torch.ops.blip3o_fast.adapter_norm_backward(
            grad, *ctx.saved_tensors, ctx.eps, parameters
        )
        return dx, *((dw, db) if parameters else (None, None)), None


torch.library.define(
    "blip3o_fast::adapter_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
)
torch.library.define(
    "blip3o_fast::adapter_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, bool parameters) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("blip3o_fast::adapter_norm", ("cpu", "cuda"))
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from blip3o_kernels import adapter_norm as kernels

    return kernels.forward(x, weight, bias, eps=eps)


@torch.library.impl("blip3o_fast::adapter_norm_backward", ("cpu", "cuda"))
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from blip3o_kernels import adapter_norm as kernels

    dx, gradients = kernels.backward(grad, x, weight, bias, eps=eps, parameters=parameters)
    dw, db = gradients or (weight.new_empty(0), bias.new_empty(0))
    return dx, dw, db


@torch.library.register_fake("blip3o_fast::adapter_norm")
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    del weight, bias, eps
    return x.new_empty(x.shape)


@torch.library.register_fake("blip3o_fast::adapter_norm_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, eps
    dw, db = (u.new_empty(u.shape if parameters else (0,)) for u in (weight, bias))
    return x.new_empty(x.shape), dw, db
