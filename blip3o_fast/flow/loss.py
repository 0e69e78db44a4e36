"""The training loss, as a record of choices that is called with tensors."""

from dataclasses import dataclass

from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.reference import Conventions, LossTerms, LossWeights


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
    conventions: Conventions = "consistent"
    masks: bool | None = None
    impl: ops.Impl | None = None

    def __post_init__(self) -> None:
        if len(self.weights) != 4 or min(self.weights) < 0:
            raise ValueError(f"weights: expected four non-negative numbers, got {self.weights}")
        if self.conventions not in ("consistent", "published"):
            raise ValueError(
                f"conventions: expected consistent or published, got {self.conventions!r}"
            )

    def __call__(
        self, velocity: Tensor, x_t: Tensor, x_1: Tensor, noise: Tensor, t: Tensor
    ) -> LossTerms:
        """Terms of the loss; everything but ``t`` ``[B]`` is ``[B, N, C]``."""
        masks = self.conventions == "published" if self.masks is None else self.masks
        return ops.flow_loss(
            velocity,
            x_t,
            x_1,
            noise,
            t,
            weights=LossWeights(*self.weights),
            conventions=self.conventions,
            masks=masks,
            impl=self.impl,
        )
