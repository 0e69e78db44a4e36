"""A run: who is left out and why, what fails alone, what is freed, and what the record says."""

import gc
import os
import signal
import weakref

import pytest
import torch

from blip3o_fast.benchmarking import selection, suite
from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import Ceilings
from blip3o_fast.benchmarking.clock import Budget
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.record import read_record
from blip3o_fast.benchmarking.selection import GROUPS, Settings, choose_sources, omissions
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.suite import RUN, Run, Stopped, measured, run_suite, stop_on_signals
from blip3o_fast.benchmarking.watch import Prepared
from blip3o_fast.benchmarking.work import Work

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, quick=True, groups=("ops",), seconds=0.01)
WHERE = "rope, tiny-b1, fp32"


def task(name="rope"):
    return Task("ops", name, "tiny-b1", "fp32", Work(0.0, 1e6), samples=3)


def fails(error):
    def call():
        raise error

    return call


def good(name="good", **options):
    return Contender(name, lambda: Prepared([lambda: None], rotation=5, **options))


def after(calls, act):
    """Does nothing the first ``calls`` times."""
    made = []

    def call():
        made.append(1)
        if len(made) > calls:
            act()

    return call


MOMENTS = {
    "prepare": lambda act: act,
    "first call": lambda act: lambda: Prepared([act]),
    "timed call": lambda act: lambda: Prepared([after(2, act)]),
}
"""When a contender does something: its ``prepare``, by what it does."""


def bad(when, error, ours=True):
    return Contender("bad", MOMENTS[when](fails(error)), ours)


@pytest.fixture
def sources(monkeypatch):
    """Makes a run of the cases that are given, and ceilings that rise during the run."""
    rising = iter([1e9, 2e9])
    monkeypatch.setattr(
        suite,
        "measure_ceilings",
        lambda *_, **__: Ceilings(next(rising), {"fp32": 1e12, "bf16": 1e12}, 1e9),
    )

    def put(*made):
        monkeypatch.setattr(
            selection, "cpu_sources", lambda settings: (("ops", make) for make in made)
        )

    return put


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("when", MOMENTS)
def test_a_contender_that_fails_costs_only_itself(sources, when, ours):
    """Ours is a failure, a peer is left out; the contenders beside it and later cases are timed."""
    error = RuntimeError("no\n  kernel")
    first = Case(task(), (good("before"), bad(when, error, ours), good("after")))
    sources(lambda: iter([first, Case(task("swiglu"), (good(),))]))
    run = run_suite(SETTINGS)
    names = [(row.name, row.contender) for row in run.measurements]
    assert names == [("rope", "before"), ("rope", "after"), ("swiglu", "good")]
    reasons, others = (run.failures, run.left_out) if ours else (run.left_out, run.failures)
    assert reasons[f"{WHERE}: bad"] == "RuntimeError: no kernel"
    assert f"{WHERE}: bad" not in others


def test_memory_that_does_not_suffice_is_no_failure(sources):
    case = Case(task(), (good(), bad("first call", torch.OutOfMemoryError("128 GiB"))))
    sources(lambda: [case])
    run = run_suite(SETTINGS)
    assert len(run.measurements) == 1 and not run.failures
    assert run.left_out[f"{WHERE}: bad"] == "OutOfMemoryError: 128 GiB"


def test_cases_that_cannot_be_made_cost_no_others(sources):
    def broken():
        yield Case(task(), (good(),))
        raise RuntimeError("no backend")

    sources(broken, lambda: [Case(task("swiglu"), (good(),))])
    run = run_suite(SETTINGS)
    assert [row.name for row in run.measurements] == ["rope", "swiglu"]
    assert run.failures == {"cases of ops, source 0": "RuntimeError: no backend"}


def test_the_record_is_saved_after_every_case(sources):
    names = ("rope", "swiglu", "sandwich_norm")
    sources(lambda: [Case(task(name), (good(),)) for name in names])
    saved = []
    run = run_suite(SETTINGS, save=saved.append)
    assert [len(record.measurements) for record in saved] == [1, 2, 3]
    assert run.measurements[0].limit == saved[0].measurements[0].limit / 2, "by better ceilings"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("when", MOMENTS)
def test_a_signal_ends_the_run_with_what_is_known(sources, name, when):
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def kill():
        os.kill(os.getpid(), number)
        raise AssertionError("went on after the signal")

    killer = Contender("killer", MOMENTS[when](kill))
    cases = (Case(task(), (good(),)), Case(task("swiglu"), (killer,)))
    sources(lambda: [*cases, Case(task("sandwich_norm"), (good(),))])
    run = run_suite(SETTINGS)
    assert [row.name for row in run.measurements] == ["rope"]
    assert run.failures == {RUN: f"stopped by {name}"}
    assert signal.getsignal(number) is before


def test_a_second_signal_acts_as_ever():
    # A shell starts what it runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop_on_signals():
            with pytest.raises(Stopped, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_broken_device_ends_the_run_with_what_is_known(sources, monkeypatch):
    """After an illegal access nothing runs in the process: each later case would fail as well."""
    case = Case(task("swiglu"), (bad("timed call", RuntimeError("illegal memory access")),))
    cases = [Case(task(), (good(),)), case, Case(task("rope backward"), (good(),))]
    synchronize = fails(RuntimeError("illegal memory access"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: synchronize())
    sources(lambda: cases)
    check = Run._check_device

    def on_cuda(self, task):
        self.device = torch.device("cuda")
        check(self, task)

    monkeypatch.setattr(Run, "_check_device", on_cuda)
    run = run_suite(SETTINGS)
    assert [row.name for row in run.measurements] == ["rope"]
    assert set(run.failures) == {"swiglu, tiny-b1, fp32: bad", RUN}
    assert "after swiglu, tiny-b1, fp32" in run.failures[RUN]


@pytest.mark.parametrize("when", MOMENTS)
def test_everything_is_closed_whatever_happens(sources, when):
    closed = []

    def close(name, error=None):
        closed.append(name)
        if error is not None:
            raise error

    failing = MOMENTS[when](fails(RuntimeError("no kernel")))

    def prepare():
        prepared = failing()
        prepared.close = lambda: close("bad")
        return prepared

    unclosed = good("cannot be closed", close=lambda: close("no", OSError("busy")))
    contenders = (good(close=lambda: close("good")), unclosed, Contender("bad", prepare))
    sources(lambda: [Case(task(), contenders), Case(task("swiglu"), (good(),))])
    run = run_suite(SETTINGS)
    assert sorted(closed) == (["good", "no"] if when == "prepare" else ["bad", "good", "no"])
    assert run.failures == {WHERE: "OSError: busy", f"{WHERE}: bad": "RuntimeError: no kernel"}
    names = [row.contender for row in run.measurements]
    assert names == ["good", "cannot be closed", "good"], "what was timed counts"


def test_results_keep_no_tensors(sources):
    def prepare():
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        return Prepared([lambda: tensor.sum()])

    alive = []
    sources(lambda: iter([Case(task(), (Contender("it", prepare),))]))
    run = run_suite(SETTINGS)
    gc.collect()
    assert run.measurements and alive[0]() is None


def test_a_timing_stands_beside_its_limit(sources):
    sources(lambda: [Case(task(), (good(),))])
    run = Run(SETTINGS)
    for case in run.cases():
        run.measure(case)
    row = measured(run.results[0], Ceilings(1e9, {"fp32": 1e9}, 1e9))
    assert (row.limit, row.bound) == (1e-3, "memory")
    assert (row.batch, row.rotation, row.ours) == (3, 5, True)
    assert row.samples >= 3


def test_a_run(sources, tmp_path):
    shape = Shape("tiny", 1, 16)

    def norm_cases():
        cases = op_cases(shape, "fp32", CPU, compiled=False)
        return [case for case in cases if case.task.name.startswith("sandwich_norm")]

    sources(norm_cases)
    told = []
    run = run_suite(SETTINGS, told.append)
    assert told == [
        "ceilings of this device",
        "ops: sandwich_norm, tiny-b1-n16, fp32",
        "ops: sandwich_norm backward, tiny-b1-n16, fp32",
    ]
    assert run.bandwidth == 2e9, "the higher of both measurements"
    first, aten, second = run.measurements
    assert (aten.name, aten.contender, aten.limit) == (first.name, "aten", first.limit)
    assert first.limit == 2 * 16 * 384 * 4 / 2e9
    assert second.limit == 3 * 16 * 384 * 4 / 2e9
    assert first.warm is not None and first.rotation > 0
    assert run.settings == {"quick": True, "groups": ["ops"], "published": False, "seconds": 0.01}
    assert run.peers["published implementation"].startswith("absent: no checkout was named")
    assert {"liger-kernel", "quack-kernels", "apex", "flash-attn"} <= set(run.peers)
    assert run.failures == {}
    run.write(tmp_path / "bench.json")
    assert read_record(tmp_path / "bench.json") == run


def test_what_a_run_leaves_out_is_said():
    left = omissions(Settings(CPU, quick=True, groups=("ops",)))
    assert set(left) == {*GROUPS, "torch.compile", "Triton and CUDA kernels"} - {"ops"}
    cuda = torch.device("cuda")
    assert set(omissions(Settings(cuda))) == set()
    left = omissions(Settings(cuda, quick=True))
    assert set(left) == {"torch.compile", "translations without a graph"}


def choose_cases(settings):
    return [case for _, make in choose_sources(settings) for case in make()]


@pytest.mark.parametrize("quick", [True, False])
def test_a_cpu_run_has_every_group(quick):
    cases = choose_cases(Settings(CPU, quick=quick))
    assert list(dict.fromkeys(case.task.group for case in cases)) == list(GROUPS)
    compiled = {
        case.task.group for case in cases for c in case.contenders if "torch.compile" in c.name
    }
    assert compiled == (set() if quick else {"ops", "block", "evaluation"})
    keys = [(case.task, c.name) for case in cases for c in case.contenders]
    assert len(set(keys)) == len(keys)
    assert all(max(case.task.work) > 0 for case in cases)


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_on_a_gpu_translates_by_graphs_alone(quick):
    settings = Settings(torch.device("cuda"), quick=quick, groups=("generate",))
    sources = list(selection.choose_sources(settings))
    assert {make.keywords["eager"] for _, make in sources} == {not quick}


def test_only_the_groups_that_were_asked_for():
    cases = choose_cases(Settings(CPU, quick=True, groups=("attention", "loader")))
    assert {case.task.group for case in cases} == {"attention", "loader"}


def test_a_quick_run_takes_few_samples():
    assert Settings(CPU, quick=True).budget == Budget(0.3, rounds=3, most=50)
    assert Settings(CPU, quick=True, seconds=0.1).budget.seconds == 0.1
    assert Settings(CPU, seconds=7.0).budget == Budget(7.0, rounds=5)
