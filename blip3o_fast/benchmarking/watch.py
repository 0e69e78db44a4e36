"""The clocks: the host's, and the device's events."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import NamedTuple

import torch

Call = Callable[[], object]

CPU_ROTATION = 16 << 20
SAMPLE_SECONDS = 2e-3
MOST_CALLS = 200
QUEUE = 20
"""Calls that queue up on CUDA: well below the 1,024 launches that a stream holds."""
DELAY_CYCLES = 1 << 20
ATTEMPTS = 6


@dataclass
class Prepared:
    """Something ready to be timed.

    Attributes:
        calls: the same work on distinct tensors, called in rotation.
        kernel: whether launches may queue up behind a delay on the device.
        warm: whether ``calls[0]`` is also timed alone.
        rotation: bytes that the tensors of all calls take together, 0 if nothing rotates.
        per_call: how often a call does the task; times are divided by it.
        close: frees what garbage collection does not.
    """

    calls: Sequence[Call]
    kernel: bool = True
    warm: bool = False
    rotation: int = 0
    per_call: int = 1
    close: Call | None = None


class Sample(NamedTuple):
    """Mean seconds of some calls; whether the device never waited for the host, where asked."""

    seconds: float
    queued: bool | None = None


class Watch:
    """The host's clock; the device is the host."""

    def first(self, prepared: Prepared) -> int | None:
        """Call everything once; bytes that a call allocates at most, where that is known."""
        for call in prepared.calls:
            call()
        return None

    def count(self, prepared: Prepared) -> int:
        """Calls of a sample: enough to outlast the clock's noise."""
        start = time.perf_counter()
        prepared.calls[0]()
        once = time.perf_counter() - start
        return min(MOST_CALLS, max(1, int(SAMPLE_SECONDS / max(once, 1e-7))))

    def sample(self, calls: Iterator[Call], count: int, kernel: bool) -> Sample:
        """Time ``count`` calls."""
        del kernel
        start = time.perf_counter()
        run(calls, count)
        return Sample((time.perf_counter() - start) / count)

    def host(self, prepared: Prepared) -> float | None:
        """Seconds that the host spends on launching; None where the host does the work."""
        del prepared
        return None


class DeviceWatch(Watch):
    """The device's events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.delay = DELAY_CYCLES

    def first(self, prepared: Prepared) -> int | None:
        """See ``Watch``."""
        super().first(prepared)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        prepared.calls[0]()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def count(self, prepared: Prepared) -> int:
        """See ``Watch``."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        prepared.calls[0]()
        torch.cuda.synchronize(self.device)
        once = time.perf_counter() - start
        if once > SAMPLE_SECONDS or not prepared.kernel:
            return 1
        return QUEUE

    def sample(self, calls: Iterator[Call], count: int, kernel: bool) -> Sample:
        """See ``Watch``. The delay doubles until the queue is full before it ends."""
        if not kernel:
            return Sample(self._timed(calls, count, delay=0)[0])
        for _ in range(ATTEMPTS):
            seconds, started = self._timed(calls, count, self.delay)
            if not started:
                return Sample(seconds, queued=True)
            self.delay *= 2
        return Sample(seconds, queued=False)  # pyright: ignore[reportPossiblyUnboundVariable]

    def _timed(self, calls: Iterator[Call], count: int, delay: int) -> tuple[float, bool]:
        """Seconds a call, and whether the device had started when the last was launched."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if delay:
            torch.cuda._sleep(delay)  # pyright: ignore[reportPrivateUsage]
        start.record()
        run(calls, count)
        end.record()
        started = start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count, started

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


def make_watch(device: torch.device) -> Watch:
    """What times calls on ``device``."""
    return DeviceWatch(device) if device.type == "cuda" else Watch()


def rotation_bytes(device: torch.device) -> int:
    """Bytes over which calls rotate to find a cold cache."""
    if device.type == "cuda":
        return 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_ROTATION


def run(calls: Iterator[Call], count: int) -> None:
    """The next ``count`` calls."""
    for call in islice(calls, count):
        call()
