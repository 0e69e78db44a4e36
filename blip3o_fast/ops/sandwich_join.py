"""Close one residual sub-layer and open the next, as one op."""

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
from blip3o_fast.ops.sandwich_norm import check_modulation
from blip3o_fast.reference import Modulation


def sandwich_join(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation | None,
    *,
    eps: float,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``x_out = x + norm(layer_scale * y; post)`` and ``h = norm(x_out; pre)``.

    ``norm`` is ``sandwich_norm``.

    Args:
        x: residual stream ``[B, N, D]``, any strides.
        y: output of the sub-layer's branch, ``[B, N, D]``, any strides.
        layer_scale: ``[D]``, or None for 1.
        post: norm and modulation of the branch, or None to add it as it is (plain pre-norm).
        pre: norm and modulation that open the next sub-layer, or None at the end of a stack.
        eps: added to every mean square.
        impl: None chooses by device.

    Returns:
        ``(x_out, h)``, both ``[B, N, D]`` in the dtype of ``x``; ``h`` is None when ``pre`` is.
        Differentiable once in every tensor.
    """
    check_join(x, y, layer_scale, post, pre)
    impl = resolve_impl(impl, x, op="sandwich_join")
    if impl in (Impl.REFERENCE, Impl.ATEN):
        join = reference.sandwich_join if impl is Impl.REFERENCE else _aten.sandwich_join
        with outside_autocast(x):
            return join(x, y, layer_scale, post, pre, eps)
    x_out, h = _SandwichJoin.apply(
        x, y, layer_scale, *(post or _ABSENT), *(pre or _ABSENT), eps, impl
    )
    return x_out, None if pre is None else h


def check_join(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation | None,
) -> None:
    """Raise ``ValueError`` unless ``x`` and ``y`` are ``[B, N, D]`` and the others fit them."""
    check_shape("x", x, "B N D")
    B, N, D = x.shape
    check_shape("y", y, "B N D", B=B, N=N, D=D)
    check_tensors(x=x, y=y, layer_scale=layer_scale)
    if layer_scale is not None:
        check_shape("layer_scale", layer_scale, "D", D=D)
    for prefix, norm in (("post.", post), ("pre.", pre)):
        if norm is not None:
            check_modulation(prefix, *norm, batch=B, width=D)
            check_tensors(x=x, **{prefix + k: v for k, v in norm._asdict().items()})


_ABSENT = (None,) * 4


class _SandwichJoin(torch.autograd.Function):
    """Inputs: x, y, layer_scale, the four tensors of post, the four of pre, eps, impl."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *parameters, ctx.eps, ctx.impl = rest
        x_out, h = operators(ctx.impl).sandwich_join(x, y, *parameters, ctx.eps)
        ctx.save_for_backward(x_out, y, *parameters)
        ctx.set_materialize_grads(False)
        return x_out, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_out: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x_out, y, layer_scale, *norms = ctx.saved_tensors
        post, pre = norms[:4], norms[4:]
        if pre[0] is None or dh is None:
            pre, dh = _ABSENT, None
        dx, dy, *rest = operators(ctx.impl).sandwich_join_backward(
            dx_out,
            dh,
            x_out,
            y,
            layer_scale,
            *post,
            *pre,
            ctx.eps,
            any(ctx.needs_input_grad[2:11]),
        )
        if layer_scale is None and post[0] is None:
            dy = dx.to(y.dtype)
        given = (layer_scale, *post, *pre)
        wanted = [
            g if u is not None and needed else None
            for g, u, needed in zip(rest, given, ctx.needs_input_grad[2:11], strict=True)
        ]
        return dx, dy, *wanted, None, None


_NORMS = (
    "Tensor? layer_scale, Tensor? w3, Tensor? w4, Tensor? post_shift, Tensor? post_scale, "
    "Tensor? w1, Tensor? w2, Tensor? pre_shift, Tensor? pre_scale, float eps"
)
torch.library.define(
    "blip3o_fast::sandwich_join",
    f"(Tensor x, Tensor y, {_NORMS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "blip3o_fast::sandwich_join_backward",
    f"(Tensor? dx_out, Tensor? dh, Tensor x_out, Tensor y, {_NORMS}, bool parameters) -> "
    f"({', '.join(['Tensor'] * 11)})",
)


@torch.library.impl("blip3o_fast::sandwich_join", ("cpu", "cuda"))
def _forward(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from blip3o_kernels import sandwich_join as kernels

    layer_scale, *norms, eps = rest
    x_out, h = kernels.forward(x, y, layer_scale, *_norms(kernels.Norm, norms), eps=eps)
    return x_out, x.new_empty(0) if h is None else h


@torch.library.impl("blip3o_fast::sandwich_join_backward", ("cpu", "cuda"))
def _backward(
    dx_out: Tensor | None, dh: Tensor | None, x_out: Tensor, y: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    from blip3o_kernels import sandwich_join as kernels

    layer_scale, *norms, eps, parameters = rest
    gradients = kernels.backward(
        dx_out,
        dh,
        x_out,
        y,
        layer_scale,
        *_norms(kernels.Norm, norms),
        eps=eps,
        parameters=parameters,
    )
    every = (
        gradients.x,
        gradients.y,
        gradients.layer_scale,
        *(gradients.post or _ABSENT),
        *(gradients.pre or _ABSENT),
    )
    return tuple(x_out.new_empty(0) if g is None else g for g in every)


def _norms(norm: Any, tensors: list[Tensor | None]) -> tuple[Any, Any]:
    """The post and the pre norm, or None."""
    post, pre = tensors[:4], tensors[4:]
    return None if post[0] is None else norm(*post), None if pre[0] is None else norm(*pre)


@torch.library.register_fake("blip3o_fast::sandwich_join")
def _forward_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del y
    _, *norms, _, _ = rest
    return x.new_empty(x.shape), x.new_empty(0 if norms[4] is None else x.shape)


@torch.library.register_fake("blip3o_fast::sandwich_join_backward")
def _backward_fake(
    dx_out: Tensor | None, dh: Tensor | None, x_out: Tensor, y: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    del dx_out, dh
    *parameters, _, wanted = rest
    transformed = parameters[0] is not None or parameters[1] is not None
    return (
        x_out.new_empty(x_out.shape),
        y.new_empty(y.shape) if transformed else x_out.new_empty(0),
        *(
            x_out.new_empty(0) if u is None or not wanted else u.new_empty(u.shape)
            for u in parameters
        ),
    )
