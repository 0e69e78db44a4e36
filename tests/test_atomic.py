import errno
import math
import os

import pytest

from blip3o_fast.atomic import PendingFile, remove_leftovers, write_atomically, write_json
from blip3o_fast.checked import parse_json


def test_the_name_appears_on_commit_only(tmp_path):
    path = tmp_path / "a.bin"
    with PendingFile(path) as pending:
        pending.write(b"hello")
        pending.write(b"J", 0)
        assert not path.exists()
    assert path.read_bytes() == b"Jello"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), PendingFile(path) as pending:
        pending.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.bin"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write a\.bin: No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_leftovers_of_a_killed_writer_are_removed_and_others_kept(tmp_path):
    for name in (".shard_00001.safetensors.77.tmp", ".shard_rank1_00001.safetensors.78.tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_leftovers(tmp_path, "shard_[0-9]*")
    assert [path.name for path in tmp_path.iterdir()] == [".shard_rank1_00001.safetensors.78.tmp"]


def test_what_json_cannot_say_is_null(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"loss": math.nan, "all": [math.inf, 1.5], "inner": {"x": -math.inf}})
    assert parse_json(path.read_bytes()) == {"loss": None, "all": [None, 1.5], "inner": {"x": None}}
