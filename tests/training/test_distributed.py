"""Two gloo processes on the CPU are one run: same weights as one process, to fp32 rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip3o_fast import load_trained_model
from blip3o_fast.processes import World, join_world
from blip3o_fast.training import checkpoints, train
from blip3o_fast.training.tracking import read_metrics
from tests.training.runs import small_options

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "max_steps": 8,
    "eval_every_n_steps": 4,
    "eval_num_samples": 3,  # odd: one process has a sample less
    "save_every_n_steps": 4,
    "eva_adapter_dropout": 0.0,  # its draws depend on the process
    "ema_decay": 0.9,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def nursery():
    """A process that starts the processes of runs."""
    path = f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.training.ranks"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield server
    server.stdin.close()
    assert server.wait(timeout=60) == 0


@pytest.fixture
def together(nursery, tmp_path):
    """Train in several processes; what each of them saw."""

    def run(options, *, processes=2, stop_after=None):
        path = tmp_path / "options.json"
        extra = {} if stop_after is None else {"stop_after": stop_after}
        path.write_text(json.dumps({**options.to_dict(), **extra}))
        nursery.stdin.write(f"{path} {processes}\n")
        nursery.stdin.flush()
        assert json.loads(nursery.stdout.readline()) == [0] * processes
        seen = [path.with_suffix(f".rank{rank}") for rank in range(processes)]
        return [json.loads(file.read_text()) for file in seen]

    return run


def assert_close(run, other, *, rtol=1e-4):
    """Weights, averages and records agree to fp32 rounding."""
    ours, theirs = (
        load_trained_model(checkpoints.complete_checkpoints(r)[0]) for r in (run, other)
    )
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(read_metrics(run), read_metrics(other), strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        for name in {"loss", "consistency_loss", "grad_norm", "token_cosine", "mse"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), (a["step"], name)


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    folders = {"chunked_embeddings_dir": shards, "output_dir": tmp_path_factory.mktemp("1") / "run"}
    return train(small_options(**folders, **SETTINGS)).folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_same_global_batch(
    parallel, options, tmp_path, alone, together
):
    seen = together(options(**SETTINGS, parallel=parallel))
    assert [rank["steps"] for rank in seen] == [8, 8]
    assert seen[0]["losses"] == seen[1]["losses"]
    assert_close(tmp_path / "run", alone)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_stopping_and_resuming_with_accumulation(parallel, options, tmp_path, alone, together):
    """Interrupted by a signal to one process only; then micro-batches instead of whole ones."""
    seen = together(options(**SETTINGS, parallel=parallel), stop_after=3)
    assert [Path(rank["stopped"]).name for rank in seen] == ["step_3", "step_3"]
    chosen = options(**SETTINGS, parallel=parallel, gradient_accumulation_steps=2)
    together(chosen)
    assert_close(tmp_path / "run", alone)


def test_the_number_of_processes_may_change(options, tmp_path, alone, together):
    together(options(**SETTINGS), stop_after=3)
    train(options(**SETTINGS))
    assert_close(tmp_path / "run", alone)


@pytest.mark.slow
def test_sharded_state_is_read_by_another_number_of_processes(options, tmp_path, alone, together):
    chosen = options(**SETTINGS, parallel="fsdp")
    together(chosen, stop_after=3)
    folder = tmp_path / "run" / "step_3"
    assert (folder / "sharded" / ".metadata").is_file()
    together(chosen, processes=4)
    assert_close(tmp_path / "run", alone)


def test_alone_is_a_world_of_one():
    with join_world("auto", torch.device("cpu")) as world:
        assert world == World() and world.is_main
        assert world.gather("x") == ["x"] and world.minimum(3) == 3
        assert world.agree(True) and not world.agree(False)
        assert torch.equal(world.sum(torch.ones(2)), torch.ones(2))
