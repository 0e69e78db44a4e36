"""Tests shared by many processes: each runs once, and one that ends its process costs no other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_tests
import pytest

SCRIPT = Path(gpu_tests.__file__)
GOOD = """
import os, pathlib, pytest
HERE = pathlib.Path(__file__).parent
@pytest.mark.parametrize("i", range(24))
def test_good(i):
    with (HERE / f"ran-{i}").open("a") as file:
        file.write("x")
"""
BAD = """
import pytest
@pytest.fixture
def broken():
    raise RuntimeError("no fixture")
def test_wrong():
    assert 1 == 2
def test_around(broken):
    pass
def test_elsewhere():
    pytest.skip("not here")
"""
CRASH = "import os\ndef test_crash():\n    os._exit(1)\n"
HANG = "import time\ndef test_hang():\n    time.sleep(600)\n"
DEVICE = """
import torch
def test_illegal():
    def synchronize():
        raise RuntimeError("illegal memory access")
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = synchronize
    torch.broken = True
    assert False, "illegal memory access"
def test_later():
    assert not hasattr(torch, "broken")
"""


@pytest.fixture
def run(tmp_path):
    """Runs files of tests, by name and text; the status, what was printed, the record."""

    def start(processes=2, words=(), **files):
        for name, text in files.items():
            (tmp_path / f"test_{name}.py").write_text(text)
        record = tmp_path / "tests.json"
        command = [sys.executable, str(SCRIPT), "--json", str(record)]
        command += [
            "--processes",
            str(processes),
            "--rootdir",
            str(tmp_path),
            *words,
            str(tmp_path),
        ]
        environment = {**os.environ, "BLIP3O_FAST_COMMIT": "cafe", "PYTHONPATH": ""}
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE
        ), record

    def finish(*args, **kwargs):
        process, record = start(*args, **kwargs)
        said, _ = process.communicate(timeout=240)
        return process.returncode, said, json.loads(record.read_text())

    finish.start = start
    return finish


def test_every_test_runs_once(run, tmp_path):
    status, said, record = run(3, good=GOOD)
    assert status == 0, said
    assert {(tmp_path / f"ran-{i}").read_text() for i in range(24)} == {"x"}
    assert record["outcomes"] == {"passed": 24} and record["tests"] == 24
    assert (record["never_run"], record["failures"], record["commit"]) == (0, [], "cafe")
    assert said.splitlines()[-1].startswith("24 passed of 24 tests")


def test_failures_are_told_and_missing_packages_left_out(run):
    files = {"bad": BAD, "absent": "import not_a_package", "broken": "1 / 0"}
    status, said, record = run(2, good=GOOD, **files)
    assert status == 1
    assert record["outcomes"] == {"passed": 24, "failed": 1, "error": 1, "skipped": 1}
    texts = {f["test"].split("::")[-1]: f["text"] for f in record["failures"]}
    assert set(texts) == {"test_wrong", "test_around", "test_broken.py"}
    assert "assert 1 == 2" in texts["test_wrong"] and "no fixture" in texts["test_around"]
    assert "ZeroDivisionError" in texts["test_broken.py"]
    (why,) = record["left_out"].values()
    assert why == "No module named 'not_a_package'"
    assert "assert 1 == 2" in said and "left out: test_absent.py" in said


def test_a_test_that_ends_its_process_costs_only_itself(run):
    """Though it is the only process: another takes its place."""
    status, said, record = run(1, good=GOOD, crash=CRASH)
    assert status == 1
    assert record["outcomes"] == {"passed": 24, gpu_tests.ENDED: 1}, said
    (failure,) = record["failures"]
    assert failure["test"].endswith("test_crash") and failure["text"] == "exit status 1"
    assert record["never_run"] == 0


@pytest.mark.slow
def test_a_device_that_a_test_broke_is_left_with_its_process(run):
    status, said, record = run(1, device=DEVICE, good=GOOD)
    assert status == 1
    assert record["outcomes"] == {"passed": 25, "failed": 1}, said
    assert [failure["test"].split("::")[-1] for failure in record["failures"]] == ["test_illegal"]


@pytest.mark.slow
def test_a_test_that_hangs_costs_only_itself(run):
    status, said, record = run(1, ["--patience", "3"], good=GOOD, hang=HANG)
    assert status == 1
    assert record["outcomes"] == {"passed": 24, gpu_tests.ENDED: 1}, said
    (failure,) = record["failures"]
    assert failure["test"].endswith("test_hang") and failure["text"] == "exit status -9"


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_run_that_is_stopped_keeps_what_it_found(run, name):
    process, path = run.start(2, good=GOOD, hang=HANG)
    for _ in range(1200):
        time.sleep(0.1)
        if path.exists() and json.loads(path.read_text())["outcomes"].get("passed", 0) >= 23:
            break
    process.send_signal(getattr(signal, name))
    said, _ = process.communicate(timeout=30)
    record = json.loads(path.read_text())
    assert process.returncode == 1
    # What hangs is no failure, and the test that its process would have run next may be missing.
    assert record["outcomes"]["passed"] + record["never_run"] == 25 and not record["failures"]
    assert record["stopped"] == name and f"stopped by {name}" in said.splitlines()[-1]


def test_a_run_of_nothing_is_no_success(run):
    status, said, record = run(2, ["-k", "nothing"], good=GOOD)
    assert status == 1 and record["tests"] == 0, said


def test_what_pytest_says_where_it_cannot_run(run):
    status, said, _ = run(1, ["--no-such-option"], good=GOOD)
    assert status == 1 and "pytest ended with exit status 4" in said
    assert "--no-such-option" in said


def test_without_pytest(monkeypatch, capsys):
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert gpu_tests.main([]) == gpu_tests.SKIPPED
    assert capsys.readouterr().out == "pytest is not installed; --wheels DIR brings it\n"


def test_what_is_missing_comes_from_the_wheels(monkeypatch, tmp_path):
    for name in ("pytest-9.0.0", "hypothesis-6.1"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    found = {"hypothesis": True}
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", found.get)
    ran = []
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda words, check: ran.append(words))
    gpu_tests.install(tmp_path, tmp_path / "site")
    (words,) = ran
    assert words[1:] == [
        *("-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(tmp_path)),
        *("--target", str(tmp_path / "site"), "pytest"),
    ]
    gpu_tests.install(None, None)
    assert len(ran) == 1
