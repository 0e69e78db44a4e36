"""Statistics of samples, turns, rotation; when a device waited for the host, and how long."""

from collections import deque
from itertools import count

import pytest
import torch

from blip3o_fast.benchmarking import watch as watches
from blip3o_fast.benchmarking.clock import (
    PATIENCE,
    Budget,
    summarise,
    time_alone,
    time_together,
)
from blip3o_fast.benchmarking.watch import DeviceWatch, Prepared, Sample, Watch, make_watch

CUDA = torch.device("cuda")


class Steady(Watch):
    """Two calls a sample, of which sample ``i`` of all watches takes ``i`` seconds."""

    numbers = count(1)

    def sample(self, calls):
        self.count = 2
        watches.run(calls, 2)
        return Sample(float(next(Steady.numbers)), host=8.0)


@pytest.fixture
def steady():
    Steady.numbers = count(1)
    return Steady


def test_median_and_quintiles():
    timing = summarise([Sample(float(x)) for x in (5, 1, 4, 2, 3)], [], 1)
    assert (timing.median, timing.samples) == (3.0, 5)
    assert (timing.low, timing.high) == pytest.approx((1.8, 4.2))
    assert (timing.host, timing.warm, timing.queued) == (None, None, None)


def test_one_sample_has_no_spread():
    timing = summarise([Sample(7.0)], [], 1)
    assert (timing.low, timing.median, timing.high) == (7.0, 7.0, 7.0)


def test_a_call_that_does_the_task_several_times():
    timing = summarise([Sample(8.0, host=6.0)], [Sample(4.0)], 4)
    assert (timing.median, timing.warm, timing.host) == (2.0, 1.0, 1.5)


def test_the_host_is_that_of_the_median_sample():
    assert summarise([Sample(1.0, host=x) for x in (9.0, 2.0, 3.0)], [], 1).host == 3.0


@pytest.mark.parametrize(
    ("cold", "warm", "queued"),
    [
        ([True, True], [True], True),
        ([True, False], [True], False),
        ([True], [False], False),
        ([None], [], None),
    ],
)
def test_queued_only_if_every_sample_was(cold, warm, queued):
    samples = [[Sample(1.0, queued=flag) for flag in flags] for flags in (cold, warm)]
    assert summarise(*samples, 1).queued is queued


def test_contenders_take_turns_over_rotating_calls(steady):
    order = []

    def call(name):
        return lambda: order.append(name)

    rotating = steady(Prepared([call("a0"), call("a1"), call("a2")]))
    warm = steady(Prepared([call("b0"), call("b1")], warm=True))
    first, second = time_together([rotating, warm], Budget(1.0, rounds=2, most=2))
    one = ["a0", "a1", "b0", "b1", "b0", "b0", "b0"]  # the third b0 is not timed
    assert order == [*one, "a2", "a0", *one[2:]]
    assert first.median == (1 + 4) / 2 and second.median == (2 + 5) / 2
    assert first.warm is None and second.warm == (3 + 6) / 2
    assert first.host == 8.0


def test_a_contender_that_fails_leaves_the_turns(steady):
    calls = iter([None, None, RuntimeError("late")])

    def fail():
        if error := next(calls):
            raise error

    good, bad = steady(Prepared([lambda: None])), steady(Prepared([fail]))
    timing, error = time_together([good, bad], Budget(1.0, rounds=4, most=4))
    assert timing.samples == 4
    assert isinstance(error, RuntimeError) and str(error) == "late"
    calls = iter([RuntimeError("alone")])
    with pytest.raises(RuntimeError, match="alone"):
        time_alone(bad, Budget(1.0))


def test_budget_bounds_the_turns(steady):
    watch = steady(Prepared([lambda: None]))
    assert time_alone(watch, Budget(1e-9, rounds=4)).samples == 1
    assert time_alone(watch, Budget(60.0, rounds=4, most=9)).samples == 9


def test_slow_contenders_get_fewer_turns():
    budget = Budget(2.0, rounds=5, most=9)
    assert budget.goes_on(0, 1e9), "at least one"
    assert budget.goes_on(4, PATIENCE * 2.0 - 0.1) and not budget.goes_on(1, PATIENCE * 2.0)
    assert budget.goes_on(8, 1.9) and not budget.goes_on(5, 2.0) and not budget.goes_on(9, 0.0)


def test_a_cpu_sample_is_the_mean_of_its_calls(monkeypatch):
    now = [0.0]

    def slow():
        now[0] += 0.25

    monkeypatch.setattr(watches.time, "perf_counter", lambda: now[0])
    watch = Watch(Prepared([slow, slow]))
    watch.start()
    assert (watch.count, watch.peak) == (1, None)
    watch.count = 4
    assert watch.cold() == Sample(0.25)


def test_a_short_call_is_repeated(monkeypatch):
    now = [0.0]

    def short():
        now[0] += 1e-4

    monkeypatch.setattr(watches.time, "perf_counter", lambda: now[0])
    for call, expected in ((short, watches.SAMPLE_SECONDS / 1e-4), (print, watches.MOST_CALLS)):
        watch = Watch(Prepared([call if call is short else lambda: None]))
        watch.start()
        assert watch.count == pytest.approx(expected, abs=1)


class Stream:
    """A stream of 1,024 launches: what the host and the device do when, in seconds.

    ``host`` is when the host goes on, ``device`` when the device is done with what is queued.
    """

    DEPTH = 1024

    def __init__(self):
        self.host = self.device = self.slept = 0.0
        self.ends = deque()

    def launch(self, on_device, on_host=5e-6):
        self.host += on_host
        while self.ends and self.ends[0] <= self.host:
            self.ends.popleft()
        if len(self.ends) >= self.DEPTH:
            self.host = self.ends.popleft()
        self.device = max(self.device, self.host) + on_device
        self.ends.append(self.device)

    def synchronize(self, device=None):
        self.host = max(self.host, self.device)

    def sleep(self, cycles):
        self.slept += cycles / watches.CYCLES
        self.launch(cycles / watches.CYCLES)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.stream.launch(0.0, 1e-6)
        self.at = self.stream.device

    def query(self):
        return self.at <= self.stream.host

    def synchronize(self):
        self.stream.host = max(self.stream.host, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(watches.time, "perf_counter", lambda: stream.host)
    monkeypatch.setattr(torch.cuda, "_sleep", stream.sleep)
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", stream.synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    return stream


def timed(stream, launches, on_device=2e-6, on_host=5e-6, **options):
    """A watch of a call of so many launches, started."""

    def call():
        for _ in range(launches):
            stream.launch(on_device, on_host)

    watch = DeviceWatch(Prepared([call], **options), CUDA)
    watch.start()
    return watch


@pytest.mark.parametrize("launches", [1, 3, 30, 76, 150, 400])
def test_calls_queue_up_whatever_they_launch(stream, launches):
    """A stream holds 1,024 launches; a host that waits for room waits until the delay is over."""
    watch = timed(stream, launches)
    samples = [watch.cold() for _ in range(10)]
    assert all(sample.queued for sample in samples)
    for sample in samples:
        assert sample.seconds == pytest.approx(launches * 2e-6, rel=0.01)
        assert sample.host == pytest.approx(launches * 5e-6, rel=0.01)
    assert launches * watch.count <= Stream.DEPTH
    assert watch.count == watches.QUEUE or launches > Stream.DEPTH // watches.QUEUE


@pytest.mark.parametrize("launches", [1, 76, 5000])
@pytest.mark.parametrize("on_host", [5e-6, 1e-3])
def test_no_sample_waits_longer_than_the_stated_bound(stream, launches, on_host):
    """Also of what cannot be queued at all, as long as one likes."""
    watch = timed(stream, launches, on_host=on_host)
    for _ in range(20):
        before, work = stream.slept, stream.host
        watch.cold()
        waited = stream.slept - before
        assert waited <= watches.ATTEMPTS * watches.LONGEST_DELAY + 1e-9 <= 0.41
        called = watches.ATTEMPTS * watches.QUEUE * launches * (on_host + 2e-6)
        assert stream.host - work <= 0.41 + called
    assert watch.delay <= watches.LONGEST_DELAY


def test_what_one_contender_needs_is_not_asked_of_the_next(stream):
    greedy = timed(stream, 5000)
    greedy.cold()
    assert greedy.delay > watches.SHORTEST_DELAY and greedy.count < watches.QUEUE
    watch = timed(stream, 1)
    before = stream.slept
    watch.cold()
    assert stream.slept - before == pytest.approx(watches.SHORTEST_DELAY)
    assert watch.count == watches.QUEUE


def test_a_host_that_was_held_up_once_gets_more_time(stream):
    watch = timed(stream, 1)
    stall = iter([1e-3])
    call = watch.prepared.calls[0]

    def stalled():
        stream.host += next(stall, 0.0)
        call()

    watch.prepared.calls = [stalled]
    assert watch.warm().queued  # the call before it stalls
    stall = iter([0.0, 1e-3])
    assert watch.warm().queued
    assert watch.delay == 2 * watches.SHORTEST_DELAY and watch.count == watches.QUEUE


def test_a_device_that_always_waits_is_host_bound(stream):
    watch = timed(stream, 5000, on_host=1e-4)
    sample = watch.cold()
    assert sample.queued is False and sample.seconds > 0
    before = stream.slept
    watch.cold()
    assert stream.slept - before == pytest.approx(watches.LONGEST_DELAY), "tried once more, no more"


def test_a_program_is_not_delayed(stream):
    watch = timed(stream, 5000, kernel=False)
    assert watch.peak == 7
    sample = watch.cold()
    assert sample.queued is None and stream.slept == 0 and watch.count == 1
    assert sample.seconds > sample.host - 1024 * 2e-6 > 0


def test_a_long_kernel_is_called_once(stream):
    watch = timed(stream, 1, on_device=5e-3)
    assert watch.count == 1 and watch.cold().queued


def test_each_kind_of_device_has_its_clock():
    prepared = Prepared([lambda: None])
    assert type(make_watch(prepared, torch.device("cpu"))) is Watch
    assert type(make_watch(prepared, CUDA)) is DeviceWatch
