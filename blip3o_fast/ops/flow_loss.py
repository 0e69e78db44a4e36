"""The four-term loss of rectified-flow training, without a host synchronisation."""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._autograd import once_differentiable
from blip3o_fast.ops._dispatch import Impl, check_tensors, outside_autocast, resolve_impl
from blip3o_fast.reference import Conventions, LossTerms, LossWeights


def flow_loss(
    velocity: Tensor,
    x_t: Tensor,
    x_1: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    weights: LossWeights,
    conventions: Conventions,
    masks: bool,
    impl: Impl | None = None,
) -> LossTerms:
    """Weighted sum of velocity, semantic, cosine and consistency terms.

    Args:
        velocity: the model's prediction ``[B, N, C]``, any strides; not empty.
        x_t: its input ``(1 - t) noise + t x_1``, ``[B, N, C]``.
        x_1: data, ``[B, N, C]``.
        noise: ``[B, N, C]``.
        t: ``[B]`` in [0, 1]; 0 is noise, 1 is data.
        weights: of the four terms.
        conventions: ``consistent``, or ``published`` for the published sign, clamps and caps.
        masks: whether the semantic and consistency terms see only samples with t > 0.5.
        impl: None chooses by device.

    Returns:
        0-d fp32 tensors (fp64 for an fp64 velocity); ``total`` is differentiable once, in
        ``velocity``, and by the reference also in the others.
    """
    check_shape("velocity", velocity, "B N C")
    B, N, C = velocity.shape
    for name, x in (("x_t", x_t), ("x_1", x_1), ("noise", noise)):
        check_shape(name, x, "B N C", B=B, N=N, C=C)
    check_shape("t", t, "B", B=B)
    if not velocity.numel():
        raise ValueError(f"velocity: expected at least one element, got {list(velocity.shape)}")
    check_tensors(velocity=velocity, x_t=x_t, x_1=x_1, noise=noise, t=t)
    others = (x_t, x_1, noise, t)
    if resolve_impl(impl, velocity, op="flow_loss") is Impl.REFERENCE:
        with outside_autocast(velocity):
            return reference.flow_loss(
                velocity, *others, weights=weights, conventions=conventions, masks=masks
            )
    if torch.is_grad_enabled() and any(u.requires_grad for u in others):
        raise ValueError(
            "x_t, x_1, noise, t: expected tensors that require no gradient, since the fused loss "
            "is differentiable in velocity alone; pass impl=Impl.REFERENCE"
        )
    published = conventions == "published"
    total, terms = _FlowLoss.apply(velocity, *others, list(weights), published, masks)
    return LossTerms(total, *terms.unbind())


class _FlowLoss(torch.autograd.Function):
    """Inputs: velocity, x_t, x_1, noise, t, weights, published, masks."""

    @staticmethod
    def forward(
        ctx: Any, velocity: Tensor, x_t: Tensor, x_1: Tensor, noise: Tensor, t: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        _, *ctx.choices = rest
        tensors = (velocity, x_t, x_1, noise, t)
        total, terms, image, factors = torch.ops.blip3o_fast.flow_loss(*tensors, *rest)
        ctx.save_for_backward(*tensors, image, factors)
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dv = torch.ops.blip3o_fast.flow_loss_backward(grad, *ctx.saved_tensors, *ctx.choices)
        return dv, *(None,) * 7


_PATH = "Tensor velocity, Tensor x_t, Tensor x_1, Tensor noise, Tensor t"
torch.library.define(
    "blip3o_fast::flow_loss",
    f"({_PATH}, float[] weights, bool published, bool masks) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "blip3o_fast::flow_loss_backward",
    f"(Tensor grad, {_PATH}, Tensor image, Tensor factors, bool published, bool masks) -> Tensor",
)


@torch.library.impl("blip3o_fast::flow_loss", ("cpu", "cuda"))
def _forward(
    velocity: Tensor,
    x_t: Tensor,
    x_1: Tensor,
    noise: Tensor,
    t: Tensor,
    weights: list[float],
    published: bool,
    masks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from blip3o_kernels import flow_loss as kernels

    return kernels.forward(
        velocity,
        x_t,
        x_1,
        noise,
        t,
        weights=LossWeights(*weights),
        published=published,
        masks=masks,
    )


@torch.library.impl("blip3o_fast::flow_loss_backward", ("cpu", "cuda"))
def _backward(grad: Tensor, *rest: Any) -> Tensor:
    from blip3o_kernels import flow_loss as kernels

    *tensors, published, masks = rest
    return kernels.backward(grad, *tensors, published=published, masks=masks)


@torch.library.register_fake("blip3o_fast::flow_loss")
def _forward_fake(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del rest
    B, _, C = velocity.shape
    wide = reference.accumulation_dtype(velocity.dtype)
    shapes = ((), (4,), (B, C), (4,))
    total, terms, image, factors = (velocity.new_empty(shape, dtype=wide) for shape in shapes)
    return total, terms, image, factors


@torch.library.register_fake("blip3o_fast::flow_loss_backward")
def _backward_fake(grad: Tensor, velocity: Tensor, *rest: Any) -> Tensor:
    del grad, rest
    return velocity.new_empty(velocity.shape)
