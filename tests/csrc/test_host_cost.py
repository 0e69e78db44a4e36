"""Why eager calls run the build: its operators cost the host less than Triton's launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.build import host_compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_call_of_the_build_costs_the_host_less_than_one_of_triton():
    """Figures are printed: ``pytest -s``."""
    host_compiler()
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "tests", "benchmarks"))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.csrc.host_cost"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"sandwich_join", "swiglu", "solver_update"} <= {row["op"] for row in rows}
    for row in rows:
        sys.stdout.write(
            f"\n{row['op']}: Triton {row['triton']:.0f} us, CUDA C++ {row['cuda']:.0f} us"
        )
        assert row["cuda"] < row["triton"]
