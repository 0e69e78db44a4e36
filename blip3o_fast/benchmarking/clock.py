"""How things are timed.

Contenders take turns, so that a machine that slows down slows all of them. A turn is a sample: the
mean of some calls, or one call of what takes long. The figure is the median of the samples, beside
their quintiles.

On CUDA the time is the device's, between two events. For a kernel (``Prepared.kernel``) the calls
queue up behind a device-side delay, so that the host's time to launch them does not show; whether
the queue was full before the delay ended is checked. For a program it includes every gap that the
host leaves, as a user would see it. The host's own cost of a call is measured apart.

Cold: the calls rotate over copies of their tensors. On CUDA they together exceed the L2 cache three
times; on a CPU they exceed a core's own caches (``watch.CPU_ROTATION``), while a last-level cache
that is shared can hold hundreds of megabytes and stays warm. Warm: the same tensors again and
again, after one call that is not timed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from statistics import median, quantiles

from blip3o_fast.benchmarking.watch import Prepared, Sample, Watch


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``rounds`` turns each, then until ``seconds`` have passed."""

    seconds: float
    rounds: int = 5
    most: int = 200


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quintiles of ``samples`` turns.

    ``host`` is what the host spends on launching a call (None on a CPU), ``warm`` the median on the
    same tensors, ``queued`` whether the device never waited for the host (None where that was not
    asked).
    """

    median: float
    low: float
    high: float
    samples: int
    host: float | None = None
    warm: float | None = None
    queued: bool | None = None


def time_together(prepared: Sequence[Prepared], watch: Watch, budget: Budget) -> list[Timing]:
    """Time contenders in turns; all their calls have been made once (``Watch.first``)."""
    counts = [watch.count(p) for p in prepared]
    rotations = [cycle(p.calls) for p in prepared]
    cold: list[list[Sample]] = [[] for _ in prepared]
    warm: list[list[Sample]] = [[] for _ in prepared]
    deadline = time.perf_counter() + budget.seconds
    turns = 0
    while turns < budget.rounds or (time.perf_counter() < deadline and turns < budget.most):
        for i, p in enumerate(prepared):
            cold[i].append(watch.sample(rotations[i], counts[i], p.kernel))
            if p.warm:
                p.calls[0]()
                warm[i].append(watch.sample(repeat(p.calls[0]), counts[i], p.kernel))
        turns += 1
    return [summarise(cold[i], warm[i], p.per_call, watch.host(p)) for i, p in enumerate(prepared)]


def summarise(
    cold: Sequence[Sample], warm: Sequence[Sample], per_call: int, host: float | None
) -> Timing:
    """Median and quintiles of a task, of which a call does ``per_call``."""
    seconds = [sample.seconds / per_call for sample in cold]
    low, *_, high = quantiles(seconds, n=5, method="inclusive") if seconds[1:] else seconds * 2
    asked = [sample.queued for sample in (*cold, *warm) if sample.queued is not None]
    return Timing(
        median=median(seconds),
        low=low,
        high=high,
        samples=len(seconds),
        host=None if host is None else host / per_call,
        warm=median(sample.seconds / per_call for sample in warm) if warm else None,
        queued=all(asked) if asked else None,
    )
