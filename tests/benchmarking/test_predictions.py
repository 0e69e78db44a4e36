"""Predictions: there is one for everything that a GPU would measure, and old ones say so."""

import pytest
import torch

from blip3o_fast.benchmarking import op_cases as op_module
from blip3o_fast.benchmarking import predictions
from blip3o_fast.benchmarking.cases import Task
from blip3o_fast.benchmarking.predictions import Predictions, find_predictions, read_predictions
from blip3o_fast.benchmarking.selection import OP_SHAPES, Settings, choose_sources
from blip3o_fast.benchmarking.work import Work

GPUS = read_predictions()["gpus"]


@pytest.mark.parametrize("quick", [True, False])
def test_every_op_case_of_a_gpu_is_predicted(quick, monkeypatch):
    """Else: ``python kernels/predict_kernels.py --bench``."""
    monkeypatch.setattr(op_module, "compile_reference", lambda *_: None)
    settings = Settings(torch.device("meta"), quick=quick, groups=("ops",))  # as a GPU's
    tasks = [case.task for _, make in choose_sources(settings) for case in make()]
    tasks = [task for task in tasks if not task.work.flops]  # products are not
    assert len(tasks) > 20
    for gpu in GPUS:
        found = Predictions("", gpu["fractions"])
        fractions = {task: found.fraction(task, "triton") for task in tasks}
        assert [task for task, x in fractions.items() if x is None or not 0 < x <= 1] == []


def test_nothing_else_is_predicted():
    for gpu in GPUS:
        assert list(gpu["fractions"]) == [shape.name for shape in OP_SHAPES]
    found = Predictions("", GPUS[0]["fractions"])
    task = Task("ops", "swiglu", "base-b64", "bf16", Work())
    assert found.fraction(task, "triton") is not None
    assert found.fraction(task, "cuda") is None
    for name, other in {"group": "block", "dtype": "fp32", "shape": "base-b3"}.items():
        changed = {**vars(task), name: other}
        assert found.fraction(Task(**changed), "triton") is None


def test_the_gpu_of_the_nearest_bandwidth():
    rates = {gpu["name"]: gpu["bandwidth"] for gpu in GPUS}
    assert "for an H100 whose copy reaches 3e+03 GB/s" in find_predictions(90, 2e12).about
    h200 = find_predictions(90, 1.1 * rates["H200"])
    assert "H200" in h200.about and h200.fractions == GPUS[list(rates).index("H200")]["fractions"]
    nothing = find_predictions(89, 1e12)
    assert nothing == Predictions("nothing is predicted for sm_89", {})


def test_predictions_of_other_kernels_say_so(monkeypatch):
    for digest, other in ((read_predictions()["kernels"], False), ("changed", True)):
        monkeypatch.setattr(predictions, "kernels_digest", lambda digest=digest: digest)
        assert ("predictions are of other kernels" in find_predictions(90, 3e12).about) is other


def test_the_digest_sees_every_kernel(monkeypatch, tmp_path):
    def digest():
        return predictions.kernels_digest.__wrapped__()

    first = digest()
    (tmp_path / "blip3o_kernels").mkdir()
    for text in ("", "x = 1", "x = 2"):
        (tmp_path / "blip3o_kernels" / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "blip3o_kernels", raising=False)
        now = digest()
        assert now != first
        first = now
