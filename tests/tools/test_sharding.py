"""FSDP2 by recipes that know nothing of this library: two processes equal one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tools import sharded
from tests.tools.models import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What the processes of ``sharded`` saw, by the name of the recipe."""
    file = tmp_path_factory.mktemp("sharded") / "seen.pt"
    path = f"{ROOT}:{ROOT / 'kernels'}"
    subprocess.run(
        [sys.executable, "-m", "tests.tools.sharded", str(file)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=True,
        timeout=200,
    )
    return torch.load(file)


@pytest.fixture(scope="module")
def alone():
    return sharded.train(lambda model: None)


def test_every_weight_moves(alone):
    """By more than the processes may differ; the learned positions are not used."""
    start = dict(build().named_parameters())
    moved = {name for name, x in start.items() if (alone[name] - x).abs().max() > 4e-5}
    assert start.keys() - moved == {"pos_embed"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in sharded.RECIPES])
def test_two_processes_equal_one(together, alone, recipe):
    seen = together[recipe]
    assert seen.keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(
            seen[name],
            expected,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
