"""First contact: what a check may do to its process, and that the others answer all the same."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import smoke
import torch
from every_op import Unavailable

from blip3o_fast.benchmarking.cases import Disagreement
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Prepared

CPU = torch.device("cpu")
OPTIONS = smoke.Options(("reference",), "cpu", "tiny", (), 60.0)


def good():
    return "as it should"


def wrong():
    raise Disagreement("expected 1, got 2")


def fail():
    raise RuntimeError("no\n  kernel")


def absent():
    raise Unavailable("expected a GPU")


def crash():
    os.kill(os.getpid(), signal.SIGKILL)


def leave():
    os._exit(5)


def hang():
    time.sleep(600)


def ask(monkeypatch, *checks, patience=60.0):
    """Answers of checks of this module, by processes that are forks of this one."""
    made = {f"{i}": check for i, check in enumerate(checks)}
    fork = smoke.multiprocessing.get_context("fork")
    monkeypatch.setattr(smoke.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(smoke, "checks", lambda options: made)
    options = replace(OPTIONS, patience=patience)
    return [(a.verdict, a.detail) for a in smoke.ask(options, list(made))]


def test_what_checks_say(monkeypatch):
    assert ask(monkeypatch, good, wrong, fail, absent, good) == [
        ("good", "as it should"),
        ("wrong", "expected 1, got 2"),
        ("failed", "RuntimeError: no kernel"),
        ("not here", "expected a GPU"),
        ("good", "as it should"),
    ]


@pytest.mark.parametrize(
    "breaks, said",
    [
        (crash, "its process ended with exit status -9"),
        (leave, "its process ended with exit status 5"),
        (hang, "no answer in 1 s"),
    ],
)
def test_a_check_that_ends_its_process_costs_only_itself(monkeypatch, breaks, said):
    patience = 1.0 if breaks is hang else 60.0
    answers = ask(monkeypatch, good, breaks, good, breaks, patience=patience)
    assert answers == [("good", "as it should"), ("broke", said)] * 2


def test_a_device_that_a_check_broke_is_left_with_its_process(monkeypatch):
    """After an illegal access each later check of the process would fail as well."""

    def synchronize(device):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    made = {"first": lambda: str(os.getpid()), "second": lambda: broken.append(1) or "done"}
    made["third"] = made["first"]
    monkeypatch.setattr(smoke, "checks", lambda options: made)
    fork = smoke.multiprocessing.get_context("fork")
    monkeypatch.setattr(smoke.multiprocessing, "get_context", lambda kind: fork)
    answers = list(smoke.ask(replace(OPTIONS, device="cuda"), list(made)))
    assert [answer.verdict for answer in answers] == ["good", "broke", "good"]
    assert answers[0].detail != answers[2].detail, "another process"


def test_every_kernel_of_every_implementation_is_called():
    everything = smoke.parse_arguments([])[0]
    names = list(smoke.checks(everything))
    assert names[:4] == [
        *("one evaluation", "capture and replay", "one training step", "one FP8 product")
    ]
    kernels = {tuple(name.split(", ")) for name in names[4:]}
    ops = set(smoke.ops.OPS)
    assert kernels == {
        (op, dtype, impl.value) for op in ops for dtype in ("bf16", "fp32") for impl in smoke.Impl
    }
    some = smoke.parse_arguments(["cuda", "--ops", "rope"])[0]
    assert list(smoke.checks(some)) == ["rope, bf16, cuda", "rope, fp32, cuda"]


def test_a_kernel_that_computes_something_else_is_wrong(monkeypatch):
    op = smoke.ops.OPS["swiglu"]
    monkeypatch.setattr(smoke.every_op, "worst_distance", lambda *_: float("inf"))
    check = smoke.partial(smoke.call, op, "fp32", CPU, smoke.Impl.REFERENCE)
    assert smoke.judge(check, CPU) == ("wrong", "expected fp64 up to 0.0001 (relative), got inf")


def test_a_training_step_moves_the_weights(narrow, monkeypatch):
    training = smoke.Training(Shape("tiny", 2, 16), "fp32", CPU)
    verdict, detail = smoke.judge(smoke.partial(smoke.train, training), CPU)
    assert verdict == "good" and detail.endswith("parameters moved")

    def idle(training):
        return Prepared([lambda: torch.ones(3)])

    monkeypatch.setattr(smoke, "prepare_step", idle)
    assert smoke.judge(smoke.partial(smoke.train, training), CPU)[0] == "wrong"
    monkeypatch.setattr(
        smoke, "prepare_step", lambda _: Prepared([lambda: torch.tensor([torch.nan])])
    )
    assert "finite losses" in smoke.judge(smoke.partial(smoke.train, training), CPU)[1]


def test_an_evaluation_is_compared(narrow, monkeypatch):
    network = smoke.Network(Shape("tiny", 2, 16), "fp32", CPU)
    assert smoke.judge(smoke.partial(smoke.evaluate, network), CPU)[0] == "good"
    network._velocity = 2 * network.velocity()
    assert smoke.judge(smoke.partial(smoke.evaluate, network), CPU)[0] == "wrong"
    assert smoke.judge(smoke.partial(smoke.replay, network), CPU)[0] == "not here"


@pytest.mark.parametrize("scale, verdict", [(1.0, "good"), (1.1, "wrong")])
def test_an_fp8_product_is_compared(monkeypatch, cpu_scales_rows, scale, verdict):
    """The CPU multiplies e4m3 by the same function."""
    monkeypatch.setattr(smoke.ops, "e4m3_refusal", lambda device: None)
    monkeypatch.setattr("blip3o_fast.ops.quantised.e4m3_refusal", lambda device: None)
    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: scale * multiply(*a, **k))
    assert smoke.judge(smoke.partial(smoke.multiply, CPU), CPU)[0] == verdict


def test_the_record_is_written_after_every_check(monkeypatch, tmp_path, capsys):
    path = tmp_path / "smoke.json"
    answers = [smoke.Answer(f"{i}", "good", 0.1, "") for i in range(3)]
    seen = []

    def one_by_one(options, names):
        for answer in answers:
            yield answer
            seen.append(json.loads(path.read_text())["checks"])

    monkeypatch.setattr(smoke, "ask", one_by_one)
    assert smoke.main(["reference", "--device", "cpu", "--json", str(path)]) == 0
    assert [len(checks) for checks in seen] == [1, 2, 3]
    assert capsys.readouterr().out.splitlines()[-1] == "3 good"


@pytest.mark.parametrize(
    "verdicts, status",
    [
        (("good", "not here"), 0),
        (("good", "wrong"), 1),
        (("failed", "good"), 1),
        (("wrong", "broke"), smoke.BROKE),
    ],
)
def test_exit_status(monkeypatch, verdicts, status):
    answers = [smoke.Answer("it", verdict, 0.0, "") for verdict in verdicts]
    monkeypatch.setattr(smoke, "ask", lambda options, names: iter(answers))
    assert smoke.main(["--device", "cpu"]) == status


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smoke.main([]) == 1
    assert "expected a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["gpus"], ["--ops", "matmul"]])
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit):
        smoke.main(words)
    assert "expected some of" in capsys.readouterr().err


@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    """As a user runs it, in processes of its own: models, and kernels in Triton's interpreter."""
    words = ["models", "reference", "triton", "cuda", "--ops", "swiglu", "--preset", "tiny"]
    path = tmp_path / "smoke.json"
    words += ["--device", "cpu", "--patience", "250", "--json", str(path)]
    assert smoke.main(words) == 0
    verdicts = {c["name"]: c["verdict"] for c in json.loads(path.read_text())["checks"]}
    good = ["one evaluation", "one training step"]
    good += [
        f"swiglu, {dtype}, {impl}" for dtype in ("bf16", "fp32") for impl in ("reference", "triton")
    ]
    assert {name for name, verdict in verdicts.items() if verdict == "good"} == set(good)
    assert set(verdicts.values()) == {"good", "not here"}
