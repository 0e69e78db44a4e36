"""The loss of rectified-flow training, a sum of four terms. The host never waits for the device."""

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Arguments, Backward, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes
from blip3o_fast.reference import Conventions, LossTerms, LossWeights, accumulation_dtype


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
    """The weighted sum of the velocity, semantic, cosine and consistency terms.

    Args:
        velocity: the model's prediction ``[B, N, C]``, any strides; not empty.
        x_t: its input ``(1 - t) noise + t x_1``, ``[B, N, C]``.
        x_1: data, ``[B, N, C]``.
        noise: ``[B, N, C]``.
        t: ``[B]`` in [0, 1]; 0 is noise, 1 is data.
        weights: of the four terms.
        conventions: ``consistent``, or ``published`` for the published sign, clamps and caps.
        masks: whether the semantic and consistency terms count only samples with t > 0.5.
        impl: None chooses by device.

    Returns:
        0-d fp32 tensors (fp64 for an fp64 velocity). ``total`` is differentiable once in
        ``velocity``. The reference is differentiable in all tensors.
    """
    published = conventions == "published"
    tensors = (velocity, x_t, x_1, noise, t)
    total, terms, *_ = FLOW_LOSS(*tensors, list(weights), published, masks, impl=impl)
    return LossTerms(total, *terms.unbind())


def _require(velocity: Tensor, *others: object) -> None:
    del others
    if not velocity.numel():
        raise ValueError(f"velocity: expected at least one element, got {list(velocity.shape)}")


def _reference(
    velocity: Tensor,
    x_t: Tensor,
    x_1: Tensor,
    noise: Tensor,
    t: Tensor,
    weights: list[float],
    published: bool,
    masks: bool,
) -> tuple[Tensor, Tensor]:
    conventions = "published" if published else "consistent"
    total, *terms = reference.flow_loss(
        *(velocity, x_t, x_1, noise, t),
        weights=LossWeights(*weights),
        conventions=conventions,
        masks=masks,
    )
    return total, torch.stack(terms)


def _fake(velocity: Tensor, *others: object) -> tuple[Tensor, ...]:
    del others
    B, _, C = velocity.shape
    wide = accumulation_dtype(velocity.dtype)
    return tuple(velocity.new_empty(s, dtype=wide) for s in ((), (4,), (B, C), (4,)))


def _specimens(sizes: Sizes) -> list[Arguments]:
    C = sizes.channels
    path = (sizes.rows(C), *(sizes.wide_rows(C) for _ in range(3)), sizes.times())
    return [(*path, list(LossWeights()), published, published) for published in (False, True)]


_PATH = "Tensor velocity, Tensor x_t, Tensor x_1, Tensor noise, Tensor t"

FLOW_LOSS = register(
    Op(
        name="flow_loss",
        schema=f"({_PATH}, float[] weights, bool published, bool masks) -> "
        "(Tensor, Tensor, Tensor, Tensor)",
        axes={**dict.fromkeys(("velocity", "x_t", "x_1", "noise"), "B N C"), "t": "B"},
        reference=_reference,
        specimens=_specimens,
        fake=_fake,
        require=_require,
        backward=Backward(
            f"(Tensor grad, {_PATH}, Tensor image, Tensor factors, bool published, bool masks) -> "
            "Tensor",
            # The results are the total, its terms, and two that the gradient needs.
            saved=lambda arguments, results: (*arguments[:5], *results[2:], *arguments[6:]),
        ),
    )
)
