"""Autocast and loss scaling; an fp16 overflow, emulated on the CPU, is an ordinary event."""

import pytest
import torch

from blip3o_fast.processes import World
from blip3o_fast.training import train
from blip3o_fast.training.precision import Precision, choose_precision
from blip3o_fast.training.run import claimed
from blip3o_fast.training.run_plan import make_plan
from blip3o_fast.training.tracking import read_metrics
from blip3o_fast.training.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "fp16", "device", "expected"),
    [
        ("auto", False, CPU, "fp32"),
        ("auto", False, CUDA, "bf16"),
        ("auto", True, CUDA, "fp16"),
        ("fp32", False, CUDA, "fp32"),
    ],
)
def test_automatic_choice(name, fp16, device, expected):
    precision = choose_precision(name, fp16, device)
    assert (precision.name, precision.device_type) == (expected, device.type)


def test_only_fp16_scales_the_loss():
    assert choose_precision("fp16", False, CPU).scaler().get_scale() == 65536
    assert not choose_precision("bf16", False, CPU).scaler().is_enabled()


@pytest.fixture
def modest_scale(monkeypatch):
    """Begin at 16, where nothing overflows by itself; at 65536 even this small model does."""
    monkeypatch.setattr(Precision, "scaler", modest_scaler)


def modest_scaler(precision):
    return torch.amp.GradScaler("cpu", init_scale=16.0, enabled=precision.name == "fp16")


def overflowing(trainer, steps):
    """Make a gradient Inf at these steps, before unscaling, as an fp16 backward pass does."""

    def poison(gradient):
        bad = trainer.state.progress.step in steps
        return gradient * float("inf") if bad else gradient

    trainer.model.output_proj.weight.register_hook(poison)


def test_an_overflow_is_skipped_the_scale_backs_off_and_training_goes_on(options, modest_scale):
    chosen = options(precision="fp16", max_steps=8, eval_every_n_steps=8, save_every_n_steps=8)
    plan = make_plan(chosen, World())
    weights = []
    trainer = Trainer(plan, World(), lambda _: weights.append(snapshot(trainer.model)))
    overflowing(trainer, {2, 5, 6})
    with claimed(plan):
        trainer.run()

    steps = [record for record in read_metrics(trainer.folder) if record["kind"] == "step"]
    assert [record["skipped"] for record in steps] == [i in (2, 5, 6) for i in range(8)]
    assert [record["loss_scale"] for record in steps] == [
        *([16.0] * 3),
        *([8.0] * 3),
        *(4.0, 2.0),
    ]
    for i in (2, 5, 6):
        assert torch.equal(weights[i], weights[i - 1]), "a skipped step leaves the weights"
        assert steps[i]["grad_norm"] is None
    for i in (1, 3, 4, 7):
        assert not torch.equal(weights[i], weights[i - 1]), "the others move them"
    assert all(0.01 < r["grad_norm"] < 1e3 for r in steps if not r["skipped"]), "norms are unscaled"
    assert int(trainer.state.clipper.recorded) == 5, "only taken steps enter the window"


def test_fp16_norms_and_losses_are_those_of_fp32(options, tmp_path, modest_scale):
    settings = {"max_steps": 3, "eval_every_n_steps": 3}
    whole = train(options(**settings))
    half = train(options(**settings, precision="fp16", output_dir=tmp_path / "half"))
    for (_, a), (_, b) in zip(whole.losses, half.losses, strict=True):
        assert a == pytest.approx(b, rel=2e-2)
    a, b = (
        [r["grad_norm"] for r in read_metrics(result.folder) if r["kind"] == "step"]
        for result in (whole, half)
    )
    assert a == pytest.approx(b, rel=5e-2)


def test_a_real_overflow_at_65536_is_survived(options):
    """The published trainer never takes another step after its first."""
    result = train(options(precision="fp16", max_steps=30, eval_every_n_steps=30))
    steps = [record for record in read_metrics(result.folder) if record["kind"] == "step"]
    assert steps[0]["skipped"] and steps[0]["loss_scale"] == 65536
    assert not any(record["skipped"] for record in steps[20:])
    assert steps[-1]["loss"] < steps[0]["loss"]


def snapshot(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
