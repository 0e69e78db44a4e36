"""The worked example of CONTRIBUTING.md: an op is four files, and everything else finds it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "squared_relu"
FOUND = f"""
import torch
from blip3o_fast import ops
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.cli.doctor import op_choices
import every_op, profile_launches

shape = Shape("tiny", 1, 16)
names = [case.task.name for case in op_cases(shape, "bf16", torch.device("cpu"), compiled=False)]
assert {{"{NAME}", "{NAME} backward"}} <= set(names)
assert ops.ImplTable({NAME}=ops.Impl.TRITON).{NAME} is ops.Impl.TRITON
assert "{NAME}" in [choice.op for choice in op_choices("cpu")]
launch = profile_launches.Launch("blip3o_fast::{NAME}_backward", [[2, 8, 64]], 1, 1.0, 1)
work = profile_launches.count_work(launch, shape.config, 1, 2)
assert work.bytes == 3 * 2 * 8 * 64 * 2, work
every_op.OPS = {{"{NAME}": ops.OPS["{NAME}"]}}
assert every_op.main(["--device", "cpu", "--impl", "reference", "triton"]) == 0
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which the example has been followed."""
    copy = tmp_path_factory.mktemp("house")
    for part in ("blip3o_fast", "kernels", "tests", "benchmarks", "pyproject.toml"):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("*.so", "golden"))
        else:
            shutil.copy(source, copy)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## How an op is added") : text.index("## What a test is")]
    blocks = re.split(r"```(?:python)?\n", section)  # words and code in turns
    words = [text.strip().rpartition("\n\n")[2] for text in blocks[:-1:2]]
    paths = [re.findall(r"`([\w/]+\.py)`", paragraph)[0] for paragraph in words]
    assert paths == [
        "blip3o_fast/reference.py",
        f"blip3o_fast/ops/{NAME}.py",
        f"kernels/blip3o_kernels/{NAME}.py",
        f"tests/kernels/test_{NAME}.py",
    ]
    for path, code in zip(paths, blocks[1::2], strict=True):
        file = copy / path
        before = file.read_text() + "\n\n" if file.exists() else ""
        file.write_text(before + code)
    return copy


def run(house: Path, *arguments: str, **environment: str) -> str:
    paths = os.pathsep.join(str(house / part) for part in (".", "kernels", "benchmarks"))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=house,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_its_own_tests_and_those_of_every_op_pass(house):
    files = ("tests/ops", f"tests/kernels/test_{NAME}.py")
    out = run(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", NAME)
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None and int(passed[1]) > 30, out


@pytest.mark.slow
def test_doctor_benchmarks_and_the_profile_find_it(house):
    run(house, "-c", "import tests.conftest\n" + FOUND, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_its_kernels_are_inspected(house, tmp_path):
    script = str(house / "kernels" / "inspect_kernels.py")
    words = ("--op", NAME, "--arch", "90", "--dtype", "bf16")
    out = run(house, script, *words, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert out.count(f"{NAME}.{NAME}_kernel") == 2
