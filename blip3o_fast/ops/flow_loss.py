"""The four-term loss of rectified-flow training, without a host synchronisation."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl
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
        velocity: the model's prediction ``[B, N, C]``.
        x_t: its input ``(1 - t) noise + t x_1``, ``[B, N, C]``.
        x_1: data, ``[B, N, C]``.
        noise: ``[B, N, C]``.
        t: ``[B]`` in [0, 1]; 0 is noise, 1 is data.
        weights: of the four terms.
        conventions: ``consistent``, or ``published`` for the published sign, clamps and caps.
        masks: whether the semantic and consistency terms see only samples with t > 0.5.
        impl: None chooses by device.

    Returns:
        0-d fp32 tensors; ``total`` is differentiable once in ``velocity``.
    """
    check_shape("velocity", velocity, "B N C")
    B, N, C = velocity.shape
    for name, x in (("x_t", x_t), ("x_1", x_1), ("noise", noise)):
        check_shape(name, x, "B N C", B=B, N=N, C=C)
    check_shape("t", t, "B", B=B)
    resolve_impl(impl, velocity)
    return reference.flow_loss(
        velocity, x_t, x_1, noise, t, weights=weights, conventions=conventions, masks=masks
    )
