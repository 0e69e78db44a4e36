"""Statistics of samples, turns, rotation, and when a device waited for the host."""

from itertools import count, islice

import pytest
import torch

from blip3o_fast.benchmarking import watch as watches
from blip3o_fast.benchmarking.clock import Budget, summarise, time_together
from blip3o_fast.benchmarking.watch import DeviceWatch, Prepared, Sample, Watch, make_watch


class Steady(Watch):
    """A clock by which sample ``i`` takes ``i`` seconds."""

    def __init__(self):
        self.samples = count(1)

    def count(self, prepared):
        return 2

    def sample(self, calls, count, kernel):
        for call in islice(calls, count):
            call()
        return Sample(float(next(self.samples)))

    def host(self, prepared):
        return 8.0


def test_median_and_quintiles():
    timing = summarise([Sample(float(x)) for x in (5, 1, 4, 2, 3)], [], 1, None)
    assert (timing.median, timing.samples) == (3.0, 5)
    assert (timing.low, timing.high) == pytest.approx((1.8, 4.2))
    assert (timing.host, timing.warm, timing.queued) == (None, None, None)


def test_one_sample_has_no_spread():
    timing = summarise([Sample(7.0)], [], 1, None)
    assert (timing.low, timing.median, timing.high) == (7.0, 7.0, 7.0)


def test_a_call_that_does_the_task_several_times():
    timing = summarise([Sample(8.0)], [Sample(4.0)], 4, 6.0)
    assert (timing.median, timing.warm, timing.host) == (2.0, 1.0, 1.5)


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
    samples = [[Sample(1.0, flag) for flag in flags] for flags in (cold, warm)]
    assert summarise(*samples, 1, None).queued is queued


def test_contenders_take_turns_over_rotating_calls():
    order = []

    def call(name):
        return lambda: order.append(name)

    rotating = Prepared([call("a0"), call("a1"), call("a2")])
    warm = Prepared([call("b0"), call("b1")], warm=True)
    first, second = time_together([rotating, warm], Steady(), Budget(0.0, rounds=2))
    one = ["a0", "a1", "b0", "b1", "b0", "b0", "b0"]  # the third b0 is not timed
    assert order == [*one, "a2", "a0", *one[2:]]
    assert first.median == (1 + 4) / 2 and second.median == (2 + 5) / 2
    assert first.warm is None and second.warm == (3 + 6) / 2
    assert first.host == 8.0


def test_budget_bounds_the_turns():
    prepared = Prepared([lambda: None])
    (few,) = time_together([prepared], Steady(), Budget(0.0, rounds=4))
    (many,) = time_together([prepared], Steady(), Budget(60.0, rounds=4, most=9))
    assert (few.samples, many.samples) == (4, 9)


def test_a_cpu_sample_is_the_mean_of_its_calls(monkeypatch):
    now = [0.0]

    def slow():
        now[0] += 0.25

    monkeypatch.setattr(watches.time, "perf_counter", lambda: now[0])
    prepared = Prepared([slow])
    watch = Watch()
    assert watch.first(prepared) is None
    assert watch.count(prepared) == 1
    assert watch.sample(iter([slow] * 4), 4, kernel=True) == Sample(0.25)


def test_a_short_call_is_repeated(monkeypatch):
    now = [0.0]

    def short():
        now[0] += 1e-4

    monkeypatch.setattr(watches.time, "perf_counter", lambda: now[0])
    assert Watch().count(Prepared([short])) == pytest.approx(watches.SAMPLE_SECONDS / 1e-4, abs=1)
    assert Watch().count(Prepared([lambda: None])) == watches.MOST_CALLS


@pytest.fixture
def device_watch(monkeypatch):
    """A device whose samples take 1 ms, and that starts too early the first ``late`` times."""
    watch, delays = DeviceWatch(torch.device("cuda")), []
    late = [0]

    def timed(calls, count, delay):
        delays.append(delay)
        late[0] -= 1
        return 1e-3, late[0] >= 0

    monkeypatch.setattr(watch, "_timed", timed)
    return watch, delays, late


def test_the_delay_doubles_until_the_queue_is_full(device_watch):
    watch, delays, late = device_watch
    late[0] = 2
    assert watch.sample(iter([]), 20, kernel=True) == Sample(1e-3, queued=True)
    start = watches.DELAY_CYCLES
    assert delays == [start, 2 * start, 4 * start]
    assert watch.sample(iter([]), 20, kernel=True).queued and delays[-1] == 4 * start


def test_a_device_that_always_waits_is_host_bound(device_watch):
    watch, delays, late = device_watch
    late[0] = 100
    assert watch.sample(iter([]), 20, kernel=True) == Sample(1e-3, queued=False)
    assert len(delays) == watches.ATTEMPTS


def test_a_program_is_not_delayed(device_watch):
    watch, delays, _ = device_watch
    assert watch.sample(iter([]), 1, kernel=False) == Sample(1e-3, queued=None)
    assert delays == [0]


def test_each_kind_of_device_has_its_clock():
    assert type(make_watch(torch.device("cpu"))) is Watch
    assert type(make_watch(torch.device("cuda"))) is DeviceWatch
