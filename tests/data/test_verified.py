"""Shards are verified once a run, and again where a file has changed."""

import os
import shutil

import pytest
from small_data import write_shards

from blip3o_fast.data import EmbeddingDataset, reader
from blip3o_fast.data.verified import VERIFIED_NAME, verify_once
from blip3o_fast.processes import World


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read, by name."""
    names = []

    def spy(path, real=reader.file_sha256):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(reader, "file_sha256", spy)
    return names


def start(folder, run):
    run.mkdir(exist_ok=True)
    verify_once(folder, EmbeddingDataset(folder).manifest.shards, run, World())


def test_a_second_start_reads_nothing(tmp_path, hashed):
    folder = write_shards(tmp_path / "shards")
    start(folder, tmp_path / "run")
    assert len(hashed) == len(set(hashed)) >= 4
    hashed.clear()
    start(folder, tmp_path / "run")
    assert hashed == []
    start(folder, tmp_path / "other_run")
    assert hashed


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_file_that_was_replaced_is_read_and_refused(tmp_path, hashed, keep_times):
    folder = write_shards(tmp_path / "shards")
    start(folder, tmp_path / "run")
    path = folder / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    times = path.stat()
    other = tmp_path / "other"
    other.write_bytes(data)
    if keep_times:
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    hashed.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shard_00001\.safetensors: corrupted or replaced"):
            start(folder, tmp_path / "run")
    assert set(hashed) == {path.name}


def test_a_touched_file_is_read_once_more(tmp_path, hashed):
    folder = write_shards(tmp_path / "shards")
    start(folder, tmp_path / "run")
    hashed.clear()
    (folder / "shard_00000.jsonl").touch()
    start(folder, tmp_path / "run")
    assert sorted(hashed) == ["shard_00000.jsonl", "shard_00000.safetensors"]
    start(folder, tmp_path / "run")
    assert len(hashed) == 2
    shutil.copytree(folder, tmp_path / "moved")
    start(tmp_path / "moved", tmp_path / "run")
    assert len(hashed) > 2, "another folder is other files"


def test_a_damaged_memory_is_named(tmp_path):
    folder = write_shards(tmp_path / "shards")
    start(folder, tmp_path / "run")
    (tmp_path / "run" / VERIFIED_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"verified\.json: expected"):
        start(folder, tmp_path / "run")
