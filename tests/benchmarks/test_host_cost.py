"""What the host pays for a call, measured with a driver that launches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_fast.ops import OPS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_op_by_triton_is_measured(tmp_path):
    """In a process of its own: kernels are compiled, where these tests interpret them."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "benchmarks"))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    target = tmp_path / "host.json"
    command = [sys.executable, "benchmarks/host_cost.py", "--calls", "20", "--json", str(target)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {row["op"]: row for row in json.loads(target.read_text())["ops"]}
    assert set(rows) == {op.name for op in OPS.values() if not op.combines}
    for row in rows.values():
        assert row["forward"] > 0 and row["torch_forward"] > 0
        assert row["both"] is None or row["both"] > row["forward"]
    assert "rms_norm of torch" in done.stdout
