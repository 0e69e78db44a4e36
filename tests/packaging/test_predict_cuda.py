"""``kernels/predict_cuda.py`` on the launchers as they are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "kernels" / "predict_cuda.py"
ROWS = 16384


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_every_kernel_over_rows_is_predicted_to_reach_nine_tenths_of_a_copy(tmp_path: Path) -> None:
    """bf16 on an H100: no thread is idle, and a copy of a kernel's own bytes is hardly faster."""
    found = tmp_path / "predicted.json"
    command = [sys.executable, str(SCRIPT), "--width", "768", "1536", "--json", str(found)]
    subprocess.run([*command, "--rows", str(ROWS)], check=True, capture_output=True)
    calls = json.loads(found.read_text())
    assert {call["width"] for call in calls} == {768, 1536}
    for call in calls:
        kernel = call["kernels"][0]
        assert kernel["copy"] / kernel["seconds"] >= 0.9, call
        assert kernel["registers"] <= 128, call
        assert kernel["binds"] == "memory", call
