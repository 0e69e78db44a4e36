"""How things are timed.

Contenders take turns, so that a machine that slows down slows all of them. A turn is a sample: the
mean of ``calls`` calls, or one call of what takes long. The figure is the median of the samples,
beside their quintiles.

On CUDA the time is the device's, between two events. For a kernel (``Prepared.kernel``) the calls
queue up behind a device-side delay, so that the host's time to launch them does not show; whether
the queue was full before the delay ended is checked. For a program it includes every gap that the
host leaves, as a user would see it. The host's own cost of a call is measured apart.

Cold: the calls rotate over copies of their tensors. On CUDA they together exceed the L2 cache three
times; on a CPU they exceed a core's own caches (``CPU_ROTATION``), while a last-level cache that is
shared can hold hundreds of megabytes and stays warm. Warm: the same tensors again and again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from statistics import median, quantiles

import torch

Call = Callable[[], object]

CPU_ROTATION = 16 << 20
SAMPLE_SECONDS = 2e-3
MOST_CALLS = 200
QUEUE = 20
"""Calls that queue up on CUDA: well below the 1,024 launches that a stream holds."""


@dataclass(frozen=True)
class Budget:
    """How long to measure: at least ``rounds`` turns each, then until ``seconds`` have passed."""

    seconds: float
    rounds: int = 5
    most: int = 200


@dataclass
class Prepared:
    """Something ready to be timed.

    Attributes:
        calls: the same work on distinct tensors, called in rotation.
        kernel: whether launches may queue up (see above).
        warm: whether ``calls[0]`` is also timed alone.
        copies_bytes: what the tensors of all calls take together.
        per_call: how often a call does the task; times are divided by it.
        close: frees what garbage collection does not.
    """

    calls: Sequence[Call]
    kernel: bool = True
    warm: bool = False
    copies_bytes: int = 0
    per_call: int = 1
    close: Call | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quintiles of ``samples`` turns.

    ``host`` is what the host spends on launching a call (None on a CPU), ``warm`` the median on the
    same tensors, ``peak`` the bytes allocated beyond what was there before (None on a CPU),
    ``queued`` whether the device never waited for the host (None where that was not asked).
    """

    median: float
    low: float
    high: float
    samples: int
    host: float | None = None
    warm: float | None = None
    peak: int | None = None
    queued: bool | None = None


def rotation_bytes(device: torch.device) -> int:
    """Bytes over which calls rotate to find a cold cache."""
    if device.type == "cuda":
        return 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_ROTATION


def time_together(
    prepared: Sequence[Prepared], device: torch.device, budget: Budget
) -> list[Timing]:
    """Time contenders in turns."""
    watch: Watch = DeviceWatch(device) if device.type == "cuda" else Watch()
    peaks = [watch.first(p) for p in prepared]
    counts = [watch.calls(p) for p in prepared]
    rotations = [cycle(p.calls) for p in prepared]
    cold: list[list[float]] = [[] for _ in prepared]
    warm: list[list[float]] = [[] for _ in prepared]
    deadline = time.perf_counter() + budget.seconds
    turns = 0
    while turns < budget.rounds or (time.perf_counter() < deadline and turns < budget.most):
        for i, p in enumerate(prepared):
            cold[i].append(watch.sample(rotations[i], counts[i], p.kernel))
            if p.warm:
                warm[i].append(watch.sample(repeat(p.calls[0]), counts[i], p.kernel))
        turns += 1
    return [
        _timing(
            [seconds / p.per_call for seconds in cold[i]],
            host=watch.host(p),
            warm=median(warm[i]) if warm[i] else None,
            peak=peaks[i],
            queued=watch.queued if p.kernel else None,
        )
        for i, p in enumerate(prepared)
    ]


class Watch:
    """The host's clock; the device is the host."""

    queued: bool | None = None

    def first(self, prepared: Prepared) -> int | None:
        """Call everything once; bytes that a call allocates at most, where that is known."""
        for call in prepared.calls:
            call()
        return None

    def calls(self, prepared: Prepared) -> int:
        """Calls of a sample: enough to outlast the clock's noise."""
        start = time.perf_counter()
        prepared.calls[0]()
        once = time.perf_counter() - start
        return min(MOST_CALLS, max(1, int(SAMPLE_SECONDS / max(once, 1e-7))))

    def sample(self, calls: Iterator[Call], count: int, kernel: bool) -> float:
        """Mean seconds of ``count`` calls in rotation."""
        del kernel
        start = time.perf_counter()
        run(calls, count)
        return (time.perf_counter() - start) / count

    def host(self, prepared: Prepared) -> float | None:
        """Seconds that the host spends on launching."""
        del prepared
        return None


class DeviceWatch(Watch):
    """The device's events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queued = True
        self.delay = 1 << 20

    def first(self, prepared: Prepared) -> int | None:
        """See ``Watch``."""
        super().first(prepared)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        prepared.calls[0]()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def calls(self, prepared: Prepared) -> int:
        """See ``Watch``."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        prepared.calls[0]()
        torch.cuda.synchronize(self.device)
        once = time.perf_counter() - start
        if once > SAMPLE_SECONDS or not prepared.kernel:
            return 1
        return QUEUE

    def sample(self, calls: Iterator[Call], count: int, kernel: bool) -> float:
        """See ``Watch``. The delay doubles until the queue is full before it ends."""
        for attempt in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            if kernel:
                torch.cuda._sleep(self.delay)  # pyright: ignore[reportPrivateUsage]
            start.record()
            run(calls, count)
            end.record()
            late = kernel and start.query()
            end.synchronize()
            if not late:
                break
            if attempt == 5:
                self.queued = False
            else:
                self.delay *= 2
        return start.elapsed_time(end) / 1e3 / count  # pyright: ignore[reportPossiblyUnboundVariable]

    def host(self, prepared: Prepared) -> float | None:
        """See ``Watch``."""
        samples: list[float] = []
        for _ in range(5):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            prepared.calls[0]()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        return median(samples)


def run(calls: Iterator[Call], count: int) -> None:
    """The next ``count`` calls."""
    for call in islice(calls, count):
        call()


def _timing(
    samples: list[float],
    *,
    host: float | None,
    warm: float | None,
    peak: int | None,
    queued: bool | None,
) -> Timing:
    low, *_, high = quantiles(samples, n=5, method="inclusive") if samples[1:] else samples * 2
    return Timing(median(samples), low, high, len(samples), host, warm, peak, queued)
