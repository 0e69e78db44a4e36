"""How things are timed.

Contenders take turns, so a machine that slows down slows all of them. A turn is a sample: the mean
of some calls, or one call if it takes long. The figure is the median of the samples, beside their
quintiles. A contender that fails has no more turns; the others go on.

On CUDA the time is the device's, between two events. For a kernel (``Prepared.kernel``) the calls
wait in a queue behind a delay on the device, so that the host's time to launch them does not count.
It is checked that all calls were queued before the delay ended. For a program the time includes the
gaps in which the device waits for the host, as a user sees it. The host's own time for a call is
measured too.

Cold: the calls rotate over copies of their tensors. On CUDA the copies are three times the size of
the L2 cache. On a CPU they exceed a core's own caches (``watch.CPU_ROTATION``); a shared last-level
cache can hold hundreds of megabytes and stays warm. Warm: the same tensors in every call, after one
call that is not timed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from blip3o_fast.benchmarking.watch import Sample, Watch

PATIENCE = 10
"""Turns end after this many times the budgeted seconds, even if there was only one."""


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``rounds`` turns each, then until ``seconds`` have passed.

    Slow contenders get fewer turns: no new one begins after ``PATIENCE * seconds``.
    """

    seconds: float
    rounds: int = 5
    most: int = 200

    def goes_on(self, turns: int, elapsed: float) -> bool:
        """Whether there is another turn after ``turns`` of them."""
        if turns < self.rounds:
            return turns == 0 or elapsed < PATIENCE * self.seconds
        return turns < self.most and elapsed < self.seconds


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quintiles of ``samples`` turns.

    ``host`` is the host's time to launch a call (None on a CPU). ``warm`` is the median on the same
    tensors. ``queued`` says whether the device never waited for the host (None: not measured).
    """

    median: float
    low: float
    high: float
    samples: int
    host: float | None = None
    warm: float | None = None
    queued: bool | None = None


def time_together(watches: Sequence[Watch], budget: Budget) -> list[Timing | Exception]:
    """Time started watches in turns. A contender that failed gives its error instead."""
    turns_of = [_Turns(watch) for watch in watches]
    start = time.perf_counter()
    turns = 0
    while budget.goes_on(turns, time.perf_counter() - start):
        for one in turns_of:
            one.take()
        turns += 1
    return [one.result() for one in turns_of]


def time_alone(watch: Watch, budget: Budget) -> Timing:
    """Time a started watch by itself.

    Raises:
        Exception: what its contender raised.
    """
    (timing,) = time_together([watch], budget)
    if isinstance(timing, Exception):
        raise timing
    return timing


class _Turns:
    """The turns of one contender, until it fails."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.cold: list[Sample] = []
        self.warm: list[Sample] = []
        self.error: Exception | None = None

    def take(self) -> None:
        if self.error is not None:
            return
        try:
            self.cold.append(self.watch.cold())
            if self.watch.prepared.warm:
                self.warm.append(self.watch.warm())
        except Exception as error:
            self.error = error

    def result(self) -> Timing | Exception:
        return self.error or summarise(self.cold, self.warm, self.watch.prepared.per_call)


def summarise(cold: Sequence[Sample], warm: Sequence[Sample], per_call: int) -> Timing:
    """Median and quintiles of a task that a call does ``per_call`` times."""
    seconds = [sample.seconds / per_call for sample in cold]
    low, *_, high = quantiles(seconds, n=5, method="inclusive") if seconds[1:] else seconds * 2
    hosts = [sample.host / per_call for sample in cold if sample.host is not None]
    asked = [sample.queued for sample in (*cold, *warm) if sample.queued is not None]
    return Timing(
        median=median(seconds),
        low=low,
        high=high,
        samples=len(seconds),
        host=median(hosts) if hosts else None,
        warm=median(sample.seconds / per_call for sample in warm) if warm else None,
        queued=all(asked) if asked else None,
    )
