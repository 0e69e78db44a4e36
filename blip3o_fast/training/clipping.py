"""Adaptive gradient clipping, decided on the device.

The global norm is that of unscaled gradients. The window holds the last ten finite norms before the
current one::

    bound = 0.5 * max_norm   if the window is full and its mean exceeds 2 * max_norm
            max_norm         otherwise
    gradients *= min(1, bound / (norm + 1e-6))

Window, bound and coefficient are tensors on the device, so the host never waits for it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WINDOW = 10
EPSILON = 1e-6
"""Added to the norm, as ``torch.nn.utils.clip_grad_norm_`` does."""


class Clip(NamedTuple):
    """0-d tensors: norm, bound, coefficient of the gradients, and whether the norm is finite."""

    norm: Tensor
    bound: Tensor
    coefficient: Tensor
    finite: Tensor


class AdaptiveClipper:
    """The bound on the gradient norm and the window that it adapts to.

    Args:
        max_norm: 0 leaves gradients as they are.
        adaptive: off keeps the bound at ``max_norm``.
        device: of the gradients.
    """

    def __init__(self, max_norm: float, *, adaptive: bool, device: torch.device) -> None:
        self.max_norm = max_norm
        self.adaptive = adaptive
        self.window = torch.zeros(WINDOW, device=device)
        self.recorded = torch.zeros((), dtype=torch.int64, device=device)
        self._slots = torch.arange(WINDOW, device=device)

    def clip(self, norm: Tensor) -> Clip:
        """Decide about gradients of this global norm (0-d, fp32), and record it if it is finite."""
        finite = norm.isfinite()
        bound = torch.full_like(norm, self.max_norm or torch.inf)
        if self.adaptive and self.max_norm:
            tight = (self.recorded >= WINDOW) & (self.window.mean() > 2 * self.max_norm)
            bound = torch.where(tight, 0.5 * bound, bound)
        here = (self._slots == self.recorded % WINDOW) & finite
        self.window = torch.where(here, norm, self.window)
        self.recorded = self.recorded + finite
        coefficient = (bound / (norm + EPSILON)).clamp(max=1.0)
        return Clip(norm, bound, coefficient, finite)

    def state_dict(self) -> dict[str, Tensor]:
        """The window and how many norms it has seen, on the CPU."""
        return {"window": self.window.cpu(), "recorded": self.recorded.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a saved window."""
        self.window = state["window"].to(self.window.device)
        self.recorded = state["recorded"].to(self.recorded.device)


def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, one 0-d tensor; sharded gradients count once."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
