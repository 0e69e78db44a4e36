"""Everything that ``bench`` prepares on a GPU is prepared on one that is not there.

Figures are printed: ``pytest -s tests/rehearsal``.
"""

import json
import sys
from collections import Counter

import pytest
import torch

from blip3o_fast.benchmarking.predictions import find_predictions
from blip3o_fast.benchmarking.selection import GROUPS
from tests.modules import MODELS
from tests.rehearsal.gpu import start
from tests.rehearsal.walk import BAITS, BANDWIDTH, PREDICTED, SECONDS

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: the thing itself"
)

LAUNCHES = {"plan, CUDA graph": 180, "plan, CUDA graph, rope in attention": 154}
"""At most, of a step of one evaluation."""
STEP_OPS = 840
"""At most, of a training step of base."""


@pytest.fixture(scope="module")
def walked():
    """Every line of the walk, by what was walked."""
    try:
        done = start("tests.rehearsal.walk")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = ("module", "bait", "script", "bench", "contender")
    return {kind: [line for line in lines if line["walked"] == kind] for kind in kinds}


def contenders(walked, group, *, ours=True):
    return {c["name"]: c for c in walked["contender"] if c["group"] == group and c["ours"] is ours}


def show(what, counts):
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    sys.stdout.write(f"\n{what}: {counts.total()}: {listed}\n")


def test_every_contender_is_prepared(walked):
    counts = Counter(c["group"] for c in walked["contender"])
    show("prepared", counts)
    assert set(counts) == set(GROUPS)
    failed = [
        f"{c['group']}, {c['task']}: {c['name']}:\n{c['error']}"
        for c in walked["contender"]
        if c["error"]
    ]
    assert not failed, "\n".join(failed)


def test_every_attention_of_torch_takes_turns(walked):
    for task in ("attention", "attention backward"):
        lines = [c for c in walked["contender"] if c["task"].startswith(f"{task}, base-b16, ")]
        ours = {c["name"]: c["ours"] for c in lines}
        assert ours == {"cudnn": True, "flash": False, "sdpa": False, "reference": False}
        (chosen,) = [c for c in lines if c["ours"]]
        (name,) = [op for op in chosen["call"]["launches"] if "scaled_dot_product" in op]
        assert name.startswith("aten::_scaled_dot_product_cudnn_attention")


def test_models_are_made_on_the_gpu(walked):
    found = {line["name"]: line["devices"] for line in walked["module"]}
    assert found == {name: ["cuda"] for name in MODELS}


def test_every_op_runs(walked):
    (script,) = walked["script"]
    checked = [line for line in script["lines"] if "not here" not in line]
    # Eight ops by Triton and five by CUDA C++ in two dtypes, and two kernels that combine ops.
    assert len(checked) == 2 * (8 + 5) + 2


def test_predictions_stand_beside_measurements(walked):
    (bench,) = walked["bench"]
    assert bench["failures"] == {}
    fractions = find_predictions(90, BANDWIDTH).fractions[PREDICTED.name]
    rows = {m["name"]: m for m in bench["measurements"] if m["contender"] == "triton"}
    assert {name: m["predicted"] for name, m in rows.items()} == fractions
    assert all(m["predicted"] is None for m in bench["measurements"] if m not in rows.values())
    title = f"swiglu, {PREDICTED.name}, bf16"
    start = next(i for i, line in enumerate(bench["text"]) if line.startswith(title))
    line = next(line for line in bench["text"][start:] if " triton " in line)
    measured = rows["swiglu"]["bytes"] / BANDWIDTH / SECONDS
    predicted = fractions["swiglu"]
    shown = [f"{measured:.0%}", f"{predicted:.0%}", f"{measured / predicted - 1:+.0%}"]
    assert " ".join(shown) in " ".join(line.split())
    assert any(line.startswith("predicted: from machine code") for line in bench["text"])


def test_the_rehearsal_sees_the_host_wait(walked):
    """Whatever makes it wait; without it the tests below could not fail."""
    assert {line["name"] for line in walked["bait"] if line["waits"]} == set(BAITS)


def test_launches_of_an_evaluation(walked):
    found = contenders(walked, "evaluation")
    for name, limit in LAUNCHES.items():
        (capture,) = found[name]["captures"]
        launches = Counter(capture["launches"])
        show(f"{name}, launches", launches)
        assert launches.total() <= limit


def test_a_capture_does_not_wait(walked):
    captures = [capture for c in walked["contender"] for capture in c["captures"]]
    assert len(captures) >= 4
    assert [capture["waits"] for capture in captures if capture["waits"]] == []


def test_a_training_step_does_not_wait(walked):
    steps = contenders(walked, "training")
    assert {"trainer", "trainer, CUDA C++"} <= set(steps)
    for name, step in steps.items():
        launches = Counter(step["call"]["launches"])
        show(f"{name}, ops", launches)
        assert launches.total() <= STEP_OPS
        assert step["call"]["waits"] == []


def test_an_evaluation_does_not_wait(walked):
    found = contenders(walked, "evaluation")
    for name in ("plan", "nothing hoisted", "plan, FP8"):
        call = found[name]["call"]
        assert call["launches"] and call["waits"] == []
