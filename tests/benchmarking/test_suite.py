"""A run: who is left out and why, what is freed, and what the record says."""

import gc
import weakref

import pytest
import torch

from blip3o_fast.benchmarking import selection, suite
from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import Ceilings
from blip3o_fast.benchmarking.clock import Budget
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.record import read_record
from blip3o_fast.benchmarking.selection import GROUPS, Settings, choose_cases, omissions
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.suite import measure, measured, run_suite
from blip3o_fast.benchmarking.watch import Prepared
from blip3o_fast.benchmarking.work import Work

CPU = torch.device("cpu")
BUDGET = Budget(0.0, rounds=2)
TASK = Task("ops", "rope", "tiny-b1", "fp32", Work(0.0, 1e6), samples=3)


def fails(error):
    def call():
        raise error

    return call


def contenders(*, prepare=None, call=None, ours=False):
    """One that works, then one that fails to be prepared or to run."""
    failing = prepare or (lambda: Prepared([call]))
    good = Contender("good", lambda: Prepared([lambda: None], rotation=5))
    return Case(TASK, (good, Contender("bad", failing, ours)))


@pytest.mark.parametrize("when", ["prepare", "call"])
def test_a_peer_that_fails_is_left_out_with_its_reason(when):
    case = contenders(**{when: fails(RuntimeError("no\n  kernel"))})
    results, failures = measure(case, CPU, BUDGET)
    assert [result.contender for result in results] == ["good"]
    assert failures == {"rope, tiny-b1, fp32: bad": "RuntimeError: no kernel"}


def test_our_own_failure_is_an_error():
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(contenders(call=fails(RuntimeError("no kernel")), ours=True), CPU, BUDGET)


def test_memory_that_does_not_suffice_is_not():
    case = contenders(call=fails(torch.OutOfMemoryError("128 GiB")), ours=True)
    results, failures = measure(case, CPU, BUDGET)
    assert len(results) == 1
    assert list(failures.values()) == ["OutOfMemoryError: 128 GiB"]


@pytest.mark.parametrize("ours", [False, True])
def test_everything_is_closed_whatever_happens(ours):
    closed = []
    call = fails(RuntimeError())
    case = contenders(
        prepare=lambda: Prepared([call], close=lambda: closed.append("bad")), ours=ours
    )
    good = Contender("good", lambda: Prepared([lambda: None], close=lambda: closed.append("good")))
    case = Case(TASK, (good, case.contenders[1]))
    if ours:
        with pytest.raises(RuntimeError):
            measure(case, CPU, BUDGET)
    else:
        measure(case, CPU, BUDGET)
    assert sorted(closed) == ["bad", "good"]


def test_results_keep_no_tensors():
    def prepare():
        tensor = torch.zeros(3)
        alive.append(weakref.ref(tensor))
        return Prepared([lambda: tensor.sum()])

    alive = []
    case = Case(TASK, (Contender("it", prepare),))
    results, _ = measure(case, CPU, BUDGET)
    del case
    gc.collect()
    assert results and alive[0]() is None


def test_a_timing_stands_beside_its_limit():
    (result,), _ = measure(Case(TASK, contenders(call=print).contenders[:1]), CPU, BUDGET)
    row = measured(result, Ceilings(1e9, {"fp32": 1e9}, 1e9))
    assert (row.limit, row.bound) == (1e-3, "memory")
    assert (row.batch, row.rotation, row.samples, row.ours) == (3, 5, 2, True)


@pytest.fixture
def few(monkeypatch):
    """A suite of one op, and ceilings that rise during the run."""

    def sources(settings):
        shape = Shape("tiny", 1, 16)
        yield "ops", lambda: list(op_cases(shape, "fp32", settings.device, compiled=False))[:2]

    rising = iter([1e9, 2e9])
    monkeypatch.setattr(selection, "cpu_sources", sources)
    monkeypatch.setattr(
        suite,
        "measure_ceilings",
        lambda *_, **__: Ceilings(next(rising), {"fp32": 1e12, "bf16": 1e12}, 1e9),
    )


def test_a_run(few, tmp_path):
    told = []
    run = run_suite(Settings(CPU, quick=True, groups=("ops",), seconds=0.01), told.append)
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
    run.write(tmp_path / "bench.json")
    assert read_record(tmp_path / "bench.json") == run


def test_what_a_run_leaves_out_is_said():
    left = omissions(Settings(CPU, quick=True, groups=("ops",)))
    assert set(left) == {*GROUPS, "torch.compile", "Triton and CUDA kernels"} - {"ops"}
    assert set(omissions(Settings(torch.device("cuda")))) == set()


@pytest.mark.parametrize("quick", [True, False])
def test_a_cpu_run_has_every_group(quick):
    cases = list(choose_cases(Settings(CPU, quick=quick)))
    assert list(dict.fromkeys(case.task.group for case in cases)) == list(GROUPS)
    compiled = {
        case.task.group for case in cases for c in case.contenders if "torch.compile" in c.name
    }
    assert compiled == (set() if quick else {"ops", "block", "evaluation"})
    keys = [(case.task, c.name) for case in cases for c in case.contenders]
    assert len(set(keys)) == len(keys)
    assert all(max(case.task.work) > 0 for case in cases)


def test_only_the_groups_that_were_asked_for():
    cases = choose_cases(Settings(CPU, quick=True, groups=("attention", "loader")))
    assert {case.task.group for case in cases} == {"attention", "loader"}


def test_a_quick_run_takes_few_samples():
    assert Settings(CPU, quick=True).budget == Budget(0.3, rounds=3, most=50)
    assert Settings(CPU, quick=True, seconds=0.1).budget.seconds == 0.1
    assert Settings(CPU, seconds=7.0).budget == Budget(7.0, rounds=5)
