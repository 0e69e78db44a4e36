"""Times, noise and dropped conditions of a step: pure functions of (seed, step, sample's row).

A row's draw does not depend on how many processes share the step or on how it is cut into
micro-batches, so neither changes what is trained, and a resumed step repeats itself exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_fast.flow import sample_times
from blip3o_fast.flow.schedule import TimeDistribution
from blip3o_fast.seeds import stream_seed

GROUP = 16
"""Rows that share a generator: fewer launches, at the price of some unused draws."""


class Draws(NamedTuple):
    """Times ``[b]``, noise ``[b, N, C]`` fp32 and kept conditions ``[b]`` of b rows."""

    t: Tensor
    noise: Tensor
    keep: Tensor

    def rows(self, piece: slice) -> "Draws":
        """Some of the rows."""
        return Draws(*(x[piece] for x in self))


def draw(
    seed: int,
    step: int,
    rows: range,
    batch_size: int,
    shape: tuple[int, int],
    *,
    distribution: TimeDistribution,
    zero_time_fraction: float,
    condition_dropout: float,
    device: torch.device,
) -> Draws:
    """Draw for ``rows`` of the global batch of ``batch_size`` samples; ``shape`` is (N, C).

    Each sample is at t = 0 with probability ``zero_time_fraction``.
    """
    generator = torch.Generator(device)
    generator.manual_seed(stream_seed(seed, step, -1))
    t = sample_times(batch_size, distribution, generator=generator, device=device)
    keep = torch.rand(batch_size, generator=generator, device=device) >= condition_dropout
    if zero_time_fraction:
        at_zero = torch.rand(batch_size, generator=generator, device=device) < zero_time_fraction
        t = t.masked_fill(at_zero, 0.0)
    noise = torch.empty(len(rows), *shape, device=device)
    for start in range(rows.start - rows.start % GROUP, rows.stop, GROUP):
        stop = min(start + GROUP, batch_size)
        generator.manual_seed(stream_seed(seed, step, start // GROUP))
        group = torch.randn(stop - start, *shape, generator=generator, device=device)
        wanted = range(max(start, rows.start), min(stop, rows.stop))
        here = slice(wanted.start - rows.start, wanted.stop - rows.start)
        noise[here] = group[wanted.start - start : wanted.stop - start]
    mine = slice(rows.start, rows.stop)
    return Draws(t[mine], noise, keep[mine])
