"""``benchmarks/gpu_check.sh`` without a GPU: what it runs, what it survives, what it reports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


def check(*arguments, python=sys.executable):
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python)},
    )


def summary(out):
    content = json.loads((out / "summary.json").read_text())
    return content, {step["name"]: step for step in content["steps"]}


@pytest.fixture
def stand_in(tmp_path):
    """A Python that obeys lines of ``case`` for some arguments and is the real one for the rest."""

    def make(*cases):
        path = tmp_path / "python"
        body = "".join(f"  {case} ;;\n" for case in cases)
        path.write_text(
            f'#!/bin/bash\ncase "$*" in\n{body}  *) exec {sys.executable} "$@" ;;\nesac\n'
        )
        path.chmod(0o755)
        return path

    return make


def test_a_failing_or_hanging_step_does_not_stop_the_others(tmp_path, stand_in):
    python = stand_in("*every_op*) echo kernel is wrong; exit 3", "*profile_ev*) sleep 60")
    started = time.monotonic()
    steps = "ops,profile,memcheck"
    done = check(tmp_path / "out", "--cpu", "--steps", steps, "--limit", 2, python=python)
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - started < 30
    content, verdicts = summary(tmp_path / "out")
    assert content["failed"] == 2 and list(verdicts) == steps.split(",")
    assert (verdicts["ops"]["verdict"], verdicts["ops"]["exit"]) == ("failed", 3)
    assert verdicts["ops"]["reason"] == "kernel is wrong"
    assert verdicts["profile"]["verdict"] == "failed"
    assert verdicts["profile"]["reason"] == "ran past its limit of 2 s"
    assert verdicts["profile"]["seconds"] >= 2
    assert verdicts["memcheck"]["verdict"] == "skipped" and verdicts["memcheck"]["exit"] is None
    assert (tmp_path / "out" / verdicts["ops"]["log"]).read_text() == "kernel is wrong\n"


def test_skipped_steps_are_not_failures_and_say_why(tmp_path):
    done = check(tmp_path, "--cpu", "--steps", "memcheck,racecheck", "--commit", "cafe")
    assert done.returncode == 0, done.stderr
    content, verdicts = summary(tmp_path)
    assert content["mode"] == "cpu" and content["commit"] == "cafe"
    assert all(step["reason"] == "compute-sanitizer watches a GPU" for step in verdicts.values())


def test_pytest_comes_from_the_wheels_where_it_is_missing(tmp_path, stand_in):
    missing = "*find_spec*pytest*) exit 1"
    done = check(tmp_path / "a", "--cpu", "--steps", "tests", python=stand_in(missing))
    _, verdicts = summary(tmp_path / "a")
    assert done.returncode == 0 and verdicts["tests"]["verdict"] == "skipped"
    assert "--wheels DIR brings it" in verdicts["tests"]["reason"]

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "pytest-9.0.0-py3-none-any.whl").touch()
    python = stand_in(missing, '*"-m pip"*) echo "pip: $*"; exit 4')
    check(tmp_path / "b", "--cpu", "--steps", "tests", "--wheels", wheels, python=python)
    _, verdicts = summary(tmp_path / "b")
    said = verdicts["tests"]["reason"]
    assert "--no-index" in said and f"--find-links {wheels}" in said and said.endswith(" pytest")


def test_a_file_that_wants_an_absent_package_is_left_out_of_the_gpu_tests(tmp_path, stand_in):
    error = "ERROR tests/extraction/test_eva.py - ModuleNotFoundError: No module named ttt"
    python = stand_in(f"*collect-only*) echo '{error}'; exit 2", '*"-m pytest"*) echo "$*"; exit 6')
    check(tmp_path, "--steps", "tests", python=python)
    log = (tmp_path / "tests.log").read_text()
    assert "left out: tests/extraction/test_eva.py: No module named ttt" in log
    assert "-m gpu" in log and "--ignore tests/extraction/test_eva.py" in log


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "expected a folder"),
        (("out", "--what"), "unknown option --what"),
        (("out", "--steps", "benhc"), "got benhc"),
        (("out", "--limit", "0"), "--limit: expected whole seconds"),
        (("out", "--limit"), "--limit: expected a value"),
        (("out", "--wheels", "/no/such"), "--wheels: expected a folder"),
    ],
)
def test_bad_arguments(arguments, said, tmp_path):
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_step_runs_on_a_cpu(tmp_path):
    done = check(tmp_path, "--cpu")
    assert done.returncode == 0, done.stdout
    content, verdicts = summary(tmp_path)
    ran = ("environment", "ops", "tests", "bench", "profile")
    assert {name: verdicts[name]["verdict"] for name in ran} == dict.fromkeys(ran, "passed")
    assert content["environment"]["device_type"] == "cpu"
    for name in ("bench/bench.json", "profile.json"):
        assert json.loads((tmp_path / name).read_text())["format"] == 1
