"""RMSNorm followed by AdaLN, which holds an RMSNorm of its own, as one op."""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops import _aten
from blip3o_fast.ops._autograd import once_differentiable
from blip3o_fast.ops._dispatch import (
    Impl,
    check_tensors,
    operators,
    outside_autocast,
    resolve_impl,
)


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
        x: ``[B, N, D]``, any strides.
        w1, w2: ``[D]``, weights of the outer and of the AdaLN's own norm.
        shift, scale: ``[B, D]``, constant over tokens; chunks of one ``[B, 2D]`` need no copy.
        eps: added to both mean squares.
        impl: None chooses by device.

    Returns:
        ``[B, N, D]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    check_norm(x, w1, w2, shift, scale)
    impl = resolve_impl(impl, x, op="sandwich_norm")
    if impl is Impl.REFERENCE:
        with outside_autocast(x):
            return reference.sandwich_norm(x, w1, w2, shift, scale, eps)
    if impl is Impl.ATEN:
        with outside_autocast(x):
            return _aten.sandwich_norm(x, reference.Modulation(w1, w2, shift, scale), eps)
    return _SandwichNorm.apply(x, w1, w2, shift, scale, eps, impl)


def check_norm(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is ``[B, N, D]`` and the others modulate it."""
    check_shape("x", x, "B N D")
    check_modulation("", w1, w2, shift, scale, batch=x.shape[0], width=x.shape[2])
    check_tensors(x=x, w1=w1, w2=w2, shift=shift, scale=scale)


def check_modulation(
    prefix: str, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, *, batch: int, width: int
) -> None:
    """Raise ``ValueError`` unless the four tensors modulate ``[batch, N, width]``."""
    check_shape(f"{prefix}w1", w1, "D", D=width)
    check_shape(f"{prefix}w2", w2, "D", D=width)
    check_shape(f"{prefix}shift", shift, "B D", B=batch, D=width)
    check_shape(f"{prefix}scale", scale, "B D", B=batch, D=width)


class _SandwichNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        impl: Impl,
    ) -> Tensor:
        ctx.save_for_backward(x, w1, w2, shift, scale)
        ctx.eps, ctx.impl = eps, impl
        return operators(impl).sandwich_norm(x, w1, w2, shift, scale, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = any(ctx.needs_input_grad[1:5])
        dx, *rest = operators(ctx.impl).sandwich_norm_backward(
            grad, *ctx.saved_tensors, ctx.eps, parameters
        )
        return dx, *(rest if parameters else (None,) * 4), None, None


torch.library.define(
    "blip3o_fast::sandwich_norm",
    "(Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, float eps) -> Tensor",
)
torch.library.define(
    "blip3o_fast::sandwich_norm_backward",
    "(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, float eps, "
    "bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("blip3o_fast::sandwich_norm", ("cpu", "cuda"))
def _forward(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    from blip3o_kernels import sandwich_norm as kernels

    return kernels.forward(x, kernels.Norm(w1, w2, shift, scale), eps=eps)


@torch.library.impl("blip3o_fast::sandwich_norm_backward", ("cpu", "cuda"))
def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from blip3o_kernels import sandwich_norm as kernels

    norm = kernels.Norm(w1, w2, shift, scale)
    dx, gradients = kernels.backward(grad, x, norm, eps=eps, parameters=parameters)
    dw1, dw2, dshift, dscale = gradients or (u.new_empty(0) for u in norm)
    return dx, dw1, dw2, dshift, dscale


@torch.library.register_fake("blip3o_fast::sandwich_norm")
def _forward_fake(
    x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    del w1, w2, shift, scale, eps
    return x.new_empty(x.shape)


@torch.library.register_fake("blip3o_fast::sandwich_norm_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad, eps
    dw1, dw2, dshift, dscale = (
        u.new_empty(u.shape if parameters else (0,)) for u in (w1, w2, shift, scale)
    )
    return x.new_empty(x.shape), dw1, dw2, dshift, dscale
