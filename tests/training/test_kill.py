"""Processes that are killed or told to stop: what is on the disk is always enough to go on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip3o_fast.training.tracking import read_metrics
from tests.training.runs import SMALL, assert_equal_runs

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(rounds, shards, tmp_path):
    seed = random.randrange(2**32)
    command = [sys.executable, "-m", "tests.training.forks"]
    done = subprocess.run(
        [*command, str(shards), str(tmp_path), str(rounds), str(seed)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (seed, done.stderr)
    assert int(done.stdout) >= rounds / 2, f"seed {seed}: few of the {2 * rounds} kills struck"
    for i in range(rounds):
        assert_equal_runs(tmp_path / str(i), tmp_path / "whole")


def test_sigterm_ends_the_command_with_143_after_saving(shards, tmp_path):
    flags = {**SMALL, "max_steps": 10**6, "chunked_embeddings_dir": shards, "output_dir": tmp_path}
    words = [f"--{name}={value}" for name, value in flags.items() if name != "progress"]
    child = subprocess.Popen(
        [sys.executable, "-m", "blip3o_fast", "train", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143
    latest = (tmp_path / "latest").read_text().strip()
    assert err.splitlines()[-1] == (
        f"blip3o-fast train: stopped by SIGTERM, saved {tmp_path / latest}"
    )
    steps = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "step"]
    assert latest == f"step_{steps[-1]}"
