"""What only a GPU can show of the trainer."""

import pytest
import torch

from blip3o_fast.processes import World
from blip3o_fast.training import train
from blip3o_fast.training.run_plan import make_plan
from blip3o_fast.training.tracking import read_metrics
from blip3o_fast.training.trainer import Trainer

pytestmark = pytest.mark.gpu
PRECISIONS = ["fp32", "bf16", "fp16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_step_never_waits_for_the_device(options, precision):
    chosen = options(device="cuda", precision=precision, ema_decay=0.9, condition_dropout=0.2)
    trainer = Trainer(make_plan(chosen, World()), World())
    with trainer.loader:
        batches = [next(trainer.loader) for _ in range(4)]
        for i in (0, 1):  # kernels are compiled at the first
            trainer.step(batches[i], i)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in (2, 3):
                trainer.step(batches[i], i)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_are_those_of_the_cpu(options, tmp_path, precision, compile):
    settings = {"eva_adapter_dropout": 0.0, "max_steps": 30, "eval_every_n_steps": 30}
    here = train(options(**settings, device="cuda", precision=precision, compile=compile))
    there = train(options(**settings, output_dir=tmp_path / "cpu"))
    # Noise is drawn by each device's own generator, so only averages can agree.
    ours, theirs = (sum(loss for _, loss in r.losses[10:]) / 20 for r in (here, there))
    assert ours == pytest.approx(theirs, rel=0.25)
    steps = [record for record in read_metrics(here.folder) if record["kind"] == "step"]
    assert len(steps) == 30
    assert sum(record["skipped"] for record in steps) <= (15 if precision == "fp16" else 0)


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(options, tmp_path):
    class Crash(Exception):
        pass

    def crash(record):
        if record.step == 5:
            raise Crash

    settings = {"device": "cuda", "deterministic": True, "log_every_n_steps": 1, "max_steps": 9}
    whole = train(options(**settings, output_dir=tmp_path / "whole"))
    with pytest.raises(Crash):
        train(options(**settings), on_step=crash)
    resumed = train(options(**settings))
    for (_, a), (_, b) in zip(whole.losses, resumed.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
