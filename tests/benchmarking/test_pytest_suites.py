"""``pytest benchmarks``: every group is there, and what its JSON says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_fast.benchmarking.selection import GROUPS

ROOT = Path(__file__).parents[2]


def benchmarks(tmp_path, *words):
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly")
    # pytest-benchmark refuses to time in a process of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        (*command, *words, f"--basetemp={tmp_path / 'base'}"),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_one_benchmark_of_an_op(tmp_path):
    file = tmp_path / "bench.json"
    words = ("-m", "cpu", "-k", "ops-swiglu and not backward", f"--benchmark-json={file}")
    status, out = benchmarks(tmp_path, "benchmarks", "--benchmark-only", *words)
    assert status == 0, out
    assert "peer liger-kernel: " in out
    content = json.loads(file.read_text())
    (row,) = content["benchmarks"]
    info = row["extra_info"]
    assert row["group"] == "ops: swiglu, base-b1, fp32"
    assert (info["name"], info["contender"], info["bound"]) == ("swiglu", "reference", "memory")
    assert info["bytes"] == 256 * 3 * 2048 * 4 and info["flops"] == 0
    assert info["fraction"] == info["limit"] / info["median"] > 0
    assert info["warm"] > 0 and info["rotation"] > info["bytes"]
    assert content["machine_info"]["environment"]["device_type"] == "cpu"
    assert "flash-attn" in content["machine_info"]["peers"]


@pytest.mark.slow
def test_the_cpu_subset_compiles_nothing(tmp_path):
    status, out = benchmarks(tmp_path, "benchmarks", "--collect-only", "-q", "-m", "cpu")
    assert status == 0, out
    assert "torch.compile" not in out
    assert all(f"[{group}-" in out for group in GROUPS)
