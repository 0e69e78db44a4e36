"""Times: the grid a sampler walks, and the distribution training draws from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from blip3o_fast.words import GridName


@dataclass(frozen=True)
class TimeGrid:
    """The steps of a sampler: a time label at the start of each, and its length.

    Attributes:
        labels: the time that the model is told at the start of each step.
        lengths: dt of each step, always towards data; they sum to 1.
        direction: +1 if a stage inside a step is labelled t + c dt, -1 for max(0, t - c dt).
        clamp: bound on the state's magnitude after every step, or None.
    """

    labels: tuple[float, ...]
    lengths: tuple[float, ...]
    direction: Literal[1, -1] = 1
    clamp: float | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, step: int, fraction: float) -> float:
        """The time told to the model at ``fraction`` of a step."""
        label = self.labels[step] + self.direction * fraction * self.lengths[step]
        return label if self.direction > 0 else max(0.0, label)


def time_grid(grid: GridName | Sequence[float], num_steps: int) -> TimeGrid:
    """A named grid, or one given by its times from 0 to 1.

    ``ascending``: t = i / steps. ``published``: what the published ``generate`` does, labels from 1
    down to 1 / steps, the second evaluation labelled t + dt, clamp 50. ``published_trainer``: the
    published trainer's and evaluator's copy, second label max(0, t - dt), clamp 10.

    Args:
        grid: a name, or ``num_steps + 1`` increasing times, the first 0 and the last 1.
        num_steps: at least 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {num_steps}")
    even = (1 / num_steps,) * num_steps
    if not isinstance(grid, str):
        return _explicit_grid(grid, num_steps)
    if grid == "ascending":
        return TimeGrid(tuple(i / num_steps for i in range(num_steps)), even)
    descending = tuple(1 - i / num_steps for i in range(num_steps))
    if grid == "published":
        return TimeGrid(descending, even, clamp=50.0)
    if grid == "published_trainer":
        return TimeGrid(descending, even, direction=-1, clamp=10.0)
    raise ValueError(
        "time_grid: expected ascending, published, published_trainer or a list of times, "
        f"got {grid!r}"
    )


def _explicit_grid(grid: Sequence[float], num_steps: int) -> TimeGrid:
    try:
        times = [float(t) for t in grid]
    except (TypeError, ValueError, RuntimeError):  # torch raises the last for a tensor on meta
        times = []
    lengths = tuple(b - a for a, b in pairwise(times))
    increasing = all(length > 0 for length in lengths)  # false for a NaN
    if len(lengths) != num_steps or not increasing or (times[0], times[-1]) != (0, 1):
        raise ValueError(
            f"time_grid: expected {num_steps + 1} increasing times from 0 to 1, got {grid}"
        )
    return TimeGrid(tuple(times[:-1]), lengths)


TimeDistribution = Literal["beta", "uniform", "logit_normal"]
MIN_TIME = 1e-3


def sample_times(
    batch: int,
    distribution: TimeDistribution = "beta",
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Training times ``[batch]``, fp32, clamped to [0.001, 0.999].

    ``beta`` is the published Beta(1/2, 1/2), dense at both ends, drawn as sin^2 of a uniform angle;
    ``logit_normal`` is the sigmoid of a standard normal (arXiv:2403.03206), dense in the middle.
    """
    if distribution == "logit_normal":
        t = torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    else:
        t = torch.rand(batch, generator=generator, device=device)
        if distribution == "beta":
            t = torch.sin(math.pi / 2 * t).square()
        elif distribution != "uniform":
            raise ValueError(
                f"distribution: expected beta, uniform or logit_normal, got {distribution!r}"
            )
    return t.clamp(MIN_TIME, 1 - MIN_TIME)
