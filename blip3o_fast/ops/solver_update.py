"""One update of the ODE state: solver weights, guidance and clamp in one pass."""

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import (
    Impl,
    check_tensors,
    operators,
    outside_autocast,
    resolve_impl,
)


def solver_update(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor | float,
    *,
    previous: Tensor | None = None,
    weight: float = 1.0,
    previous_weight: float = 0.0,
    guidance_scale: float = 1.0,
    clamp: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """``x + dt * (weight * v + previous_weight * previous)``, computed in the dtype of the state.

    Euler, both stages of Heun and of the midpoint rule, and Adams-Bashforth are choices of the two
    weights.

    Args:
        x: state ``[B, N, C]``, fp32 whatever the model's dtype.
        velocity: ``[B, N, C]``; with guidance ``[2B, N, C]``, the conditional half first. Any
            floating dtype and strides.
        dt: step, a number or a 0-d tensor on the device of ``x``.
        previous: an earlier velocity, of the shape of ``velocity``; guidance applies to the
            combination.
        weight, previous_weight: the solver's coefficients.
        guidance_scale: 1 is no guidance (arXiv:2207.12598).
        clamp: bound on the new state's magnitude, or None.
        impl: None chooses by device, and the reference where a gradient is recorded.

    Returns:
        The new state ``[B, N, C]``, dtype of ``x``. Only the reference is differentiable.
    """
    check_shape("x", x, "B N C")
    B, N, C = x.shape
    halves = 1 if guidance_scale == 1.0 else 2
    check_shape("velocity", velocity, "B N C", B=halves * B, N=N, C=C)
    if previous is not None:
        check_shape("previous", previous, "B N C", B=halves * B, N=N, C=C)
    step = dt if isinstance(dt, Tensor) else None
    if step is not None and step.dim():
        raise ValueError(f"dt: expected a number or a 0-d tensor, got {list(step.shape)}")
    check_tensors(x=x, velocity=velocity, previous=previous, dt=step)
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp: expected a bound of at least 0, or None, got {clamp}")
    given = [u for u in (x, velocity, previous) if u is not None]
    recording = torch.is_grad_enabled() and any(u.requires_grad for u in given)
    if impl is None and recording:
        impl = Impl.REFERENCE
    impl = resolve_impl(impl, x, op="solver_update")
    if impl is Impl.REFERENCE:
        with outside_autocast(x):
            return reference.solver_update(
                x,
                velocity,
                dt,
                previous=previous,
                weight=weight,
                previous_weight=previous_weight,
                guidance_scale=guidance_scale,
                clamp=clamp,
            )
    if recording:
        raise ValueError(
            f"impl={impl}: the fused update records no gradient, and an input requires one; call "
            "it under torch.no_grad(), or pass impl=Impl.REFERENCE to differentiate"
        )
    return operators(impl).solver_update(
        x,
        velocity,
        step,
        0.0 if isinstance(dt, Tensor) else dt,
        previous,
        weight,
        previous_weight,
        guidance_scale,
        clamp,
    )


torch.library.define(
    "blip3o_fast::solver_update",
    "(Tensor x, Tensor velocity, Tensor? step, float dt, Tensor? previous, float weight, "
    "float previous_weight, float guidance_scale, float? clamp) -> Tensor",
)


@torch.library.impl("blip3o_fast::solver_update", ("cpu", "cuda"))
def _forward(
    x: Tensor,
    velocity: Tensor,
    step: Tensor | None,
    dt: float,
    previous: Tensor | None,
    weight: float,
    previous_weight: float,
    guidance_scale: float,
    clamp: float | None,
) -> Tensor:
    from blip3o_kernels import solver_update as kernels

    return kernels.forward(
        x,
        velocity,
        dt if step is None else step,
        previous=previous,
        weight=weight,
        previous_weight=previous_weight,
        guidance_scale=guidance_scale,
        clamp=clamp,
    )


@torch.library.register_fake("blip3o_fast::solver_update")
def _forward_fake(
    x: Tensor,
    velocity: Tensor,
    step: Tensor | None,
    dt: float,
    previous: Tensor | None,
    weight: float,
    previous_weight: float,
    guidance_scale: float,
    clamp: float | None,
) -> Tensor:
    del velocity, step, dt, previous, weight, previous_weight, guidance_scale, clamp
    return x.new_empty(x.shape)
