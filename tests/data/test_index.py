"""Choosing samples without keeping names."""

import json
import subprocess
import sys

import numpy as np
import pytest

from blip3o_fast.data.dataset import EmbeddingDataset, photo_is_heldout
from blip3o_fast.data.index import photo_hashes
from blip3o_fast.data.sidecar import (
    MARK_EVERY,
    RecordFile,
    SampleRecord,
    encode_records,
    read_records,
)

ODD = [
    SampleRecord("a", "", "photo"),
    SampleRecord("b"),
    SampleRecord('"', '", "', "\\"),
    SampleRecord("\udc80", "line\nbreak \u2028", "\x00"),
    SampleRecord("photo"),
]


def test_photos_are_those_of_the_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(encode_records(ODD))
    assert RecordFile(tmp_path / "a.jsonl", 5).photos() == [record.photo for record in ODD]


def test_records_of_other_writers(tmp_path):
    lines = ['{ "source":"h\u00f6he", "key" : "a" }', '\ufeff{"key": "b"}', '\t{"key": "c"}  ']
    for chosen in (lines, lines[::2]):  # a byte order mark within is for single lines only
        (tmp_path / "a.jsonl").write_bytes(("\n".join(chosen) + "\n").encode())
        file = RecordFile(tmp_path / "a.jsonl", len(chosen))
        assert file.photos() == [file[row].photo for row in range(len(chosen))]


@pytest.mark.parametrize(
    "first",
    [b'{"key": "a"}, {"key": "b"}', b"", b'{"key": "a"', b'{"key": 1}', b'{"key": "a", "x": 1}'],
)
def test_what_one_call_would_misread_is_still_named(tmp_path, first):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"key": "x"}\n' + first + b'\n{"key": "y"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, row 1: "):
        RecordFile(path, 3).photos()


def test_a_hash_is_the_number_of_the_split():
    names = [f"photo{i}" for i in range(1000)] + [record.photo for record in ODD]
    hashes = photo_hashes(names)
    assert hashes.dtype == np.uint64 and len(np.unique(hashes)) == 1004  # "photo" twice
    for name, number in zip(names, hashes.tolist(), strict=True):
        if number < 2**63:  # next to 1/2, neighbouring floats of a fraction are 2**11 hashes apart
            assert photo_is_heldout(name, 0.5)
        exact = (number >> 11) / 2**53
        assert photo_is_heldout(name, exact + 2**-53) and not photo_is_heldout(name, exact)


@pytest.mark.parametrize("rows", [[0], [199, 0, 63, 64, 65, 64], list(range(200)), [130, 140]])
def test_records_by_place(tmp_path, rows):
    records = [SampleRecord(f"key{i}", "x" * (i % 50)) for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(encode_records(records))
    marks = RecordFile(path, 200).starts[::MARK_EVERY]
    assert list(read_records(path, rows, marks)) == [records[row] for row in rows]


def test_the_records_of_a_batch_are_read_when_asked_for(make_dataset):
    folder = make_dataset(samples=100, samples_per_shard=100)
    dataset = EmbeddingDataset(folder)
    batch = dataset.read([70, 99])
    path = folder / "shard_00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # Of other lines, none is looked at: those before the nearest mark are nonsense now.
    damaged = [b"?" * (len(line) - 1) + b"\n" for line in lines[:MARK_EVERY]]
    path.write_bytes(b"".join(damaged + lines[MARK_EVERY:]).replace(b"key70", b"KEY70"))
    assert batch.keys == ("KEY70", "key99")
    path.unlink()
    assert batch.sources == ("photo35", "photo49")  # and only once
    with pytest.raises(FileNotFoundError, match=r"shard_00000\.jsonl"):
        dataset.records([70])


SHARDS, ROWS = 150, 20_000
BUILD = """
import re, sys, time
from pathlib import Path
from blip3o_fast.data.index import build_index
from blip3o_fast.data.manifest import ShardEntry, Split

def memory(name):  # not ru_maxrss, which a child inherits from its parent
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

shards, rows = map(int, sys.argv[2:])
entries = [ShardEntry(f"{i}.safetensors", rows, 1, "", "") for i in range(shards)]
before, cpu = memory("VmRSS"), time.process_time()
index = build_index(Path(sys.argv[1]), entries, "all", Split(0.1))
cpu, peak = time.process_time() - cpu, memory("VmHWM") - before
heldout = build_index(Path(sys.argv[1]), entries, "heldout", Split(0.1))
kept = sum(x.nbytes for x in (index.firsts, index.rows, index.first_marks, index.marks))
print(len(index.rows), index.photos, len(heldout.rows), heldout.photos, cpu, peak, kept)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_millions_of_samples_take_little_memory_and_time(tmp_path):
    total = SHARDS * ROWS
    for i in range(SHARDS):
        numbers = range(i * ROWS, (i + 1) * ROWS)
        text = "".join(f'{{"key": "{n}", "source": "{n // 3}.jpg"}}\n' for n in numbers)
        (tmp_path / f"{i}.jsonl").write_text(text)
    command = [sys.executable, "-c", BUILD, str(tmp_path), str(SHARDS), str(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    samples, photos, heldout, heldout_photos, cpu, peak, kept = map(json.loads, done.stdout.split())
    assert (samples, photos) == (total, total // 3)
    assert heldout_photos == pytest.approx(photos / 10, rel=0.015)  # 4 standard deviations: 1.2%
    assert heldout == pytest.approx(3 * heldout_photos, abs=2)
    assert cpu < 20
    assert kept < 4.2 * total
    # 14 bytes a sample, and what one sidecar takes while it is parsed.
    assert peak < 14 * total + 1000 * ROWS, f"{peak / total:.1f} bytes a sample"
