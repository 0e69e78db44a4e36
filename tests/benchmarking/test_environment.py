"""Where a measurement was made."""

import json
import subprocess

import torch

import blip3o_fast
from blip3o_fast.benchmarking import environment
from blip3o_fast.benchmarking.environment import (
    COMMIT,
    describe_commit,
    describe_environment,
    device_name,
    find_commit,
)


def git(folder, *words):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(("git", "-C", folder, *identity, *words), check=True, capture_output=True)


def test_a_cpu():
    facts = json.loads(json.dumps(describe_environment(torch.device("cpu"))))
    assert set(facts) == {
        *("device", "device_type", "processor", "threads", "load", "driver", "cuda", "clocks"),
        *("platform", "versions", "commit", "changed", "date"),
    }
    assert facts["device"].startswith(facts["processor"])
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["load"]) == 3
    assert (facts["driver"], facts["cuda"], facts["clocks"]) == (None, None, None)
    assert facts["versions"]["blip3o_fast"] == blip3o_fast.__version__
    assert facts["versions"]["torch"] == torch.__version__


def test_the_name_of_a_cpu_counts_threads(monkeypatch):
    monkeypatch.setattr(environment, "processor_name", lambda: "CPU")
    for threads, name in ((1, "CPU, 1 thread"), (4, "CPU, 4 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert device_name(torch.device("cpu")) == name


def test_the_commit_of_a_clone(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    commit, changed = find_commit(tmp_path)
    assert commit is not None and len(commit) == 40 and changed is False
    (tmp_path / "file").write_text("b")
    assert find_commit(tmp_path) == (commit, True)
    (tmp_path / "library").mkdir()
    assert find_commit(tmp_path / "library") == (None, None)


def test_no_clone(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert find_commit(tmp_path) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert find_commit(tmp_path) == (None, None)


def test_a_copy_without_history_is_told_its_commit(monkeypatch):
    for found, expected in (((None, None), ("cafe", None)), (("beef", True), ("beef", True))):
        monkeypatch.setattr(environment, "find_commit", lambda root, found=found: found)
        monkeypatch.setenv(COMMIT, "cafe")
        assert describe_commit() == expected
    monkeypatch.setattr(environment, "find_commit", lambda root: (None, None))
    monkeypatch.delenv(COMMIT)
    assert describe_commit() == (None, None)
