"""metrics.jsonl, TensorBoard and Weights & Biases."""

import json
import sys
import types

import pytest

from blip3o_fast.errors import OptionError
from blip3o_fast.training import tracking, train
from blip3o_fast.training.step_records import StepRecord
from blip3o_fast.training.tracking import METRICS_NAME, MetricsFile, read_metrics, require_trackers
from blip3o_fast.training.validation import Validation


def write_lines(run, *records, tail=""):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run / METRICS_NAME).write_text(lines + tail)


def step(number):
    return {"kind": "step", **dict.fromkeys(StepRecord.__dataclass_fields__, 0), "step": number}


def validation(number):
    fields = Validation.__dataclass_fields__
    return {"kind": "validation", **dict.fromkeys(fields, 0), "step": number}


def test_lines_of_a_run(options):
    seen = []
    result = train(options(), on_step=seen.append)
    lines = [json.loads(line) for line in (result.folder / METRICS_NAME).read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert [record.to_dict() | {"kind": "step"} for record in seen] == [
        line for line in lines if line["kind"] == "step"
    ]
    first = lines[0]
    assert first["learning_rate"] == pytest.approx(1e-2) and first["epoch"] == 0
    assert first["seconds"] > 0 and first["data_wait"] >= 0
    assert result.losses == tuple(
        (line["step"], line["loss"]) for line in lines if "grad_norm" in line
    )


def test_a_torn_last_line_is_not_read(tmp_path):
    write_lines(tmp_path, step(1), step(2), tail='{"kind": "st')
    assert read_metrics(tmp_path) == [step(1), step(2)]
    write_lines(tmp_path, step(1), tail="{]\n" + json.dumps(step(3)) + "\n")
    assert read_metrics(tmp_path) == [step(1)]
    assert read_metrics(tmp_path / "nowhere") == []
    for line in (
        "[]",
        '{"kind": []}',
        '{"kind": "step"}',
        json.dumps({**step(2), "seconds": None}),
    ):
        write_lines(tmp_path, step(1), tail=f"{line}\n{json.dumps(step(3))}\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 2: expected a record"):
            read_metrics(tmp_path)


@pytest.mark.parametrize("validated", [True, False])
def test_steps_that_will_be_taken_again_are_removed(tmp_path, validated):
    write_lines(tmp_path, step(1), step(2), validation(2), step(3), tail="{")
    MetricsFile(tmp_path, 2, validated=validated).close()
    kept = [step(1), step(2)] + [validation(2)] * validated
    assert read_metrics(tmp_path) == kept


@pytest.mark.parametrize("name", ["use_tensorboard", "use_wandb"])
def test_an_absent_tracker_is_refused_by_name(name, options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(OptionError, match=rf"{name}: expected .*pip install .*\[logging\]"):
        require_trackers(options(**{name: True}))
    require_trackers(options())


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_every_step_and_the_same_run_after_a_resume(options, monkeypatch):
    runs = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: runs.append(FakeRun(**settings)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracking, "require_trackers", lambda options: None)
    monkeypatch.setattr("blip3o_fast.training.run.require_trackers", lambda options: None)
    train(options(use_wandb=True, wandb_run_name="name"))
    train(options(use_wandb=True))
    first, second = runs
    assert first.settings["id"] == second.settings["id"] and first.settings["resume"] == "allow"
    assert (first.settings["name"], first.settings["project"]) == ("name", "blip3o-fast")
    assert first.settings["config"]["batch_size"] == 4
    assert [s for s, values in first.logged if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [s for s, values in first.logged if "eval/token_cosine" in values] == [3, 6]
    assert first.finished and second.finished and second.logged == []


def test_tensorboard_gets_scalars(options, monkeypatch):
    scalars = []

    class Writer:
        def __init__(self, folder, purge_step):
            scalars.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, step))

        def close(self):
            scalars.append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("blip3o_fast.training.run.require_trackers", lambda options: None)
    result = train(options(use_tensorboard=True))
    assert scalars[0] == (str(result.folder / "tensorboard"), 1)
    assert ("train/loss", 6) in scalars and ("eval/image_cosine", 3) in scalars
    assert scalars[-1] == "closed"


def test_nothing_is_imported_that_is_not_asked_for(options, monkeypatch):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(options()).steps == 6
