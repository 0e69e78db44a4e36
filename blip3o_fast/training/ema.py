"""An exponential moving average of the weights.

    average <- average + (1 - d) (weights - average)      d = min(decay, (1 + n) / (10 + n))

at update n. d grows at first, so that the initial weights are forgotten soon. The averages are on
the device and sharded like the weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Averages of all floating-point parameters of ``module``, under their names.

    Args:
        module: whose parameters are followed.
        decay: in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = dict(module.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [local(x) for x in self.averages.values()],
            [local(x) for x in self.weights.values()],
            1 - decay,
        )
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the averages inside the block, and with its weights after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap values in place, one tensor at a time; the tensors keep their storage."""
        for name, weight in self.weights.items():
            mine, theirs = local(self.averages[name]), local(weight)
            spare = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(spare)

    @torch.no_grad()
    def load(self, averages: Mapping[str, Tensor], updates: int) -> None:
        """Continue from saved averages."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
        self.updates = updates


def local(x: Tensor) -> Tensor:
    """This process's shard of a distributed tensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x.detach()
