"""A run that was stopped anywhere ends bitwise where the uninterrupted one ends."""

import errno
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_fast import atomic, checkpoint
from blip3o_fast.training import TrainingInterrupted, train
from blip3o_fast.training.randomness import (
    determinism,
    random_state,
    restore_random_state,
    seed_everything,
)
from blip3o_fast.training.tracking import read_metrics
from tests.training.runs import assert_equal_runs, small_options

STEPS = 12
SETTINGS = {
    "max_steps": STEPS,
    "eval_every_n_steps": 4,
    "save_every_n_steps": 3,
    "eva_adapter_dropout": 0.3,
    "dropout_prob": 0.1,
    "condition_dropout": 0.2,
    "ema_decay": 0.9,
}
"""Five steps an epoch: stops fall in the middle of epochs and on their boundaries."""


class Crash(Exception):
    """Stands for a process that dies between two steps."""


def crash_after(step):
    def on_step(record):
        if record.step == step:
            raise Crash

    return on_step


def signal_after(step, number):
    def on_step(record):
        if record.step == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    made = {}

    def run(**changes):
        key = str(sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            folders = {"chunked_embeddings_dir": shards, "output_dir": folder}
            made[key] = train(small_options(**folders, **{**SETTINGS, **changes})).folder
        return made[key]

    return run


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_crash_after_any_step(step, options, uninterrupted):
    mine = options(**SETTINGS)
    with pytest.raises(Crash):
        train(mine, on_step=crash_after(step))
    result = train(mine)
    assert_equal_runs(result.folder, uninterrupted())
    assert len(result.losses) == STEPS


def test_a_second_and_a_third_crash(options, uninterrupted):
    mine = options(**SETTINGS)
    for step in (4, 5, 11):
        with pytest.raises(Crash):
            train(mine, on_step=crash_after(step))
    assert_equal_runs(train(mine).folder, uninterrupted())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_precision(precision, options, uninterrupted):
    mine = options(**SETTINGS, precision=precision)
    with pytest.raises(Crash):
        train(mine, on_step=crash_after(7))
    assert_equal_runs(train(mine).folder, uninterrupted(precision=precision))


@pytest.mark.parametrize(
    "free",
    [{"num_workers": 5}, {"prefetch": 1}, {"eval_batch_size": 4}, {"keep_last": 1}],
    ids=str,
)
def test_free_options_may_change(free, options, uninterrupted):
    with pytest.raises(Crash):
        train(options(**SETTINGS), on_step=crash_after(7))
    assert_equal_runs(train(options(**SETTINGS, **free)).folder, uninterrupted())


def test_a_finished_run_does_nothing_more(options):
    mine = options(**SETTINGS)
    folder = train(mine).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("step_*/*")}
    again = train(mine, on_step=crash_after(1))
    assert again.steps == STEPS and len(again.losses) == STEPS
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("step_*/*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_a_signal_saves_at_the_next_boundary(number, step, options, uninterrupted):
    """At step 8 a validation is due: it is left, and made up for after the resume."""
    mine = options(**SETTINGS)
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match=f"SIG.*saved .*step_{step}") as stop:
        train(mine, on_step=signal_after(step, number))
    assert stop.value.exit_status == (130 if number == signal.SIGINT else 143)
    assert stop.value.checkpoint == Path(mine.output_dir) / f"step_{step}"
    assert signal.getsignal(number) == before
    steps = [r["step"] for r in read_metrics(Path(mine.output_dir)) if r["kind"] == "step"]
    assert steps == list(range(1, step + 1)), "no step is lost"
    assert (Path(mine.output_dir) / "report.html").is_file()
    assert_equal_runs(train(mine).folder, uninterrupted())


class Disk:
    """Counts every write, flush and rename of the library, and fails one of them."""

    def __init__(self, monkeypatch):
        self.fails_at, self.count = -1, 0
        for owner, name in (
            *((os, "fsync"), (os, "rename"), (os, "replace")),
            *((atomic.PendingFile, "write"), (Path, "write_text")),
            *((torch, "save"), (checkpoint, "save_file")),
        ):
            self.wrap(monkeypatch, owner, name)

    def wrap(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def limited(*args, **kwargs):
            self.count += 1
            if self.count == self.fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_at_any_write(every, options, tmp_path, uninterrupted, monkeypatch):
    """Each start after a failure continues; what was there before the failure still is."""
    settings = {**SETTINGS, "max_steps": 3, "save_every_n_steps": 2, "eval_every_n_steps": 3}
    whole = uninterrupted(**settings)
    disk = Disk(monkeypatch)
    train(options(**settings, output_dir=tmp_path / "counted"))
    total = disk.count
    assert total > 30
    for moment in range(1, total + 1, every):
        mine = options(**settings, output_dir=tmp_path / str(moment))
        disk.count, disk.fails_at = 0, moment
        with pytest.raises(OSError, match="No space left"):
            train(mine)
        disk.fails_at = -1
        assert_equal_runs(train(mine).folder, whole)


def test_states_of_all_generators_come_back():
    device = torch.device("cpu")
    seed_everything(3)
    saved = random_state(device)
    first = (random.random(), np.random.rand(), torch.rand(1))
    restore_random_state(saved, device)
    assert (random.random(), np.random.rand(), torch.rand(1)) == first
    assert not torch.equal(torch.rand(1), first[2])


def test_determinism_is_as_it_was_afterwards(options):
    seen = []
    train(
        options(deterministic=True),
        on_step=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()
