"""The training loss, as a record of choices that is called with tensors."""

from dataclasses import dataclass

from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.conventions import ConventionsName, find_conventions
from blip3o_fast.reference import LossTerms, LossWeights


@dataclass(frozen=True)
class RectifiedFlowLoss:
    """Velocity, semantic, cosine and consistency terms with fixed weights.

    Attributes:
        weights: of the four terms, in that order.
        conventions: ``consistent``, or ``published`` to reproduce the published loss.
        masks: whether the semantic and consistency terms see only t > 0.5; None follows the
            conventions (off for consistent, on for published).
        impl: of ``ops.flow_loss``.
    """

    weights: tuple[float, float, float, float] = LossWeights()
    conventions: ConventionsName = "consistent"
    masks: bool | None = None
    impl: ops.Impl | None = None

    def __post_init__(self) -> None:
        if len(self.weights) != 4 or min(self.weights) < 0:
            raise ValueError(f"weights: expected four non-negative numbers, got {self.weights}")
        find_conventions(self.conventions)

    def __call__(
        self, velocity: Tensor, x_t: Tensor, x_1: Tensor, noise: Tensor, t: Tensor
    ) -> LossTerms:
        """Terms of the loss; everything but ``t`` ``[B]`` is ``[B, N, C]``."""
        rules = find_conventions(self.conventions)
        return ops.flow_loss(
            velocity,
            x_t,
            x_1,
            noise,
            t,
            weights=LossWeights(*self.weights),
            conventions=rules.loss,
            masks=rules.loss_masks if self.masks is None else self.masks,
            impl=self.impl,
        )
