"""The clocks: the host's clock, and the events of a device.

Each contender has its own watch, which adapts to it. On CUDA a sample is taken at most ``ATTEMPTS``
times, behind a delay of at most ``LONGEST_DELAY``. So no sample waits more than 0.4 s.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from typing import NamedTuple

import torch

Call = Callable[[], object]

CPU_ROTATION = 16 << 20
SAMPLE_SECONDS = 2e-3
MOST_CALLS = 200
QUEUE = 20
"""Calls that are queued on CUDA; fewer if they are more than the 1,024 launches of a stream."""
CYCLES = 2e9
"""A second on the clock of an H100; delays are counted in cycles."""
SHORTEST_DELAY, LONGEST_DELAY = 0.5e-3, 50e-3
MARGIN = 2.0
"""The delay is this many times the host's time to queue the calls."""
ATTEMPTS = 8


@dataclass
class Prepared:
    """Something ready to be timed.

    Attributes:
        calls: the same work on different tensors, called in rotation.
        kernel: whether its launches may be queued behind a delay on the device.
        warm: whether ``calls[0]`` is also timed alone.
        rotation: bytes of the tensors of all calls together; 0 if nothing rotates.
        per_call: how often a call does the task. Times are divided by it.
        close: called at the end, for what garbage collection does not free.
    """

    calls: Sequence[Call]
    kernel: bool = True
    warm: bool = False
    rotation: int = 0
    per_call: int = 1
    close: Call | None = None


class Sample(NamedTuple):
    """Mean seconds of some calls.

    ``host`` is the host's time to launch a call (None if the host does the work itself). ``queued``
    says whether the device never waited for the host (None: not measured).
    """

    seconds: float
    host: float | None = None
    queued: bool | None = None


class Watch:
    """The host's clock, for work on the host.

    Attributes:
        prepared: what is timed.
        count: calls of a sample, enough to exceed the clock's noise.
        peak: the most bytes that a call allocates, if that is known.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.count = 1
        self.peak: int | None = None
        self._rotation = cycle(prepared.calls)

    def start(self) -> None:
        """Call everything once, and decide how many calls make a sample."""
        for call in self.prepared.calls:
            call()
        start = time.perf_counter()
        self.prepared.calls[0]()
        once = time.perf_counter() - start
        self.count = min(MOST_CALLS, max(1, int(SAMPLE_SECONDS / max(once, 1e-7))))

    def cold(self) -> Sample:
        """A sample over the calls in rotation."""
        return self.sample(self._rotation)

    def warm(self) -> Sample:
        """A sample of the first call repeated, after one call that is not timed."""
        self.prepared.calls[0]()
        return self.sample(repeat(self.prepared.calls[0]))

    def sample(self, calls: Iterator[Call]) -> Sample:
        """Time ``count`` calls."""
        start = time.perf_counter()
        run(calls, self.count)
        return Sample((time.perf_counter() - start) / self.count)


class DeviceWatch(Watch):
    """The events of a device.

    Attributes:
        delay: seconds that the device sleeps before the calls of a sample, so that the host can
            queue all of them.
    """

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        super().__init__(prepared)
        self.device = device
        self.delay = 0.0

    def start(self) -> None:
        """See ``Watch``."""
        for call in self.prepared.calls:
            call()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        self.prepared.calls[0]()
        host = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        once = time.perf_counter() - start
        self.peak = torch.cuda.max_memory_allocated(self.device) - before
        if not self.prepared.kernel:
            return
        self.count = QUEUE if once <= SAMPLE_SECONDS else 1
        self.delay = min(LONGEST_DELAY, max(SHORTEST_DELAY, MARGIN * host * self.count))

    def sample(self, calls: Iterator[Call]) -> Sample:
        """See ``Watch``.

        The device may start before the last call is queued. Then either the delay was too short, so
        it is doubled, or the stream was full and the host waited for the device, so half as many
        calls are queued. Later samples keep the new delay and count.
        """
        if not self.prepared.kernel:
            return self._timed(calls)._replace(queued=None)
        sample = self._timed(calls)
        for attempt in range(1, ATTEMPTS):
            if sample.queued or (self.count == 1 and self.delay == LONGEST_DELAY):
                break
            if attempt % 2:
                self.delay = min(LONGEST_DELAY, 2 * self.delay)
            else:
                self.count = max(1, self.count // 2)
            sample = self._timed(calls)
        return sample

    def _timed(self, calls: Iterator[Call]) -> Sample:
        """Time calls behind the delay. ``queued``: all were queued before the first began."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.delay:
            torch.cuda._sleep(int(self.delay * CYCLES))  # pyright: ignore[reportPrivateUsage]
        start.record()
        began = time.perf_counter()
        run(calls, self.count)
        host = time.perf_counter() - began
        end.record()
        queued = not start.query()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        return Sample(seconds / self.count, host / self.count, queued)


def make_watch(prepared: Prepared, device: torch.device) -> Watch:
    """A watch for calls on ``device``, not yet started."""
    return DeviceWatch(prepared, device) if device.type == "cuda" else Watch(prepared)


def rotation_bytes(device: torch.device) -> int:
    """How many bytes the tensors of rotating calls must have, so that caches are cold."""
    if device.type == "cuda":
        return 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_ROTATION


def run(calls: Iterator[Call], count: int) -> None:
    """The next ``count`` calls."""
    for call in islice(calls, count):
        call()
