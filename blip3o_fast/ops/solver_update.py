"""One update of the ODE state: solver weights, guidance and clamp in one pass."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl


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
        velocity: ``[B, N, C]``; with guidance ``[2B, N, C]``, the conditional half first.
        dt: step, a number or a 0-d tensor on the device of ``x``.
        previous: an earlier velocity, laid out like ``velocity``; guidance applies to the combination.
        weight, previous_weight: the solver's coefficients.
        guidance_scale: 1 is no guidance (arXiv:2207.12598).
        clamp: bound on the new state's magnitude, or None.
        impl: None chooses by device.

    Returns:
        The new state ``[B, N, C]``, dtype of ``x``. Not differentiable.
    """
    check_shape("x", x, "B N C")
    B, N, C = x.shape
    halves = 1 if guidance_scale == 1.0 else 2
    check_shape("velocity", velocity, "B N C", B=halves * B, N=N, C=C)
    if previous is not None:
        check_shape("previous", previous, "B N C", B=halves * B, N=N, C=C)
    resolve_impl(impl, x)
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
