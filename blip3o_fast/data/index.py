"""Which rows of which shards one side of a data set holds, in a few bytes per sample.

Names are not kept in memory. A record is read from its sidecar when it is needed, and photos are
distinguished by 64-bit hashes. With n photos, the probability that two share a hash and count as
one is n^2 / 2^65: 2e-5 for 27 million.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from blip3o_fast.data.manifest import ShardEntry, Split
from blip3o_fast.data.sidecar import MARK_EVERY, RecordFile, SampleRecord, read_records

Side = Literal["train", "heldout", "all"]


class SampleIndex(NamedTuple):
    """The samples of one side, numbered from 0 in the order of the shards.

    Attributes:
        folder, entries: where the shards lie, and what the manifest says of them.
        firsts: int64 ``[shards + 1]``; rows of all shards before each.
        rows: int32 or int64 ``[samples]``; the row of each sample, counted over all shards.
        first_marks: int64 ``[shards + 1]``; marks of all shards before each.
        marks: int64; byte at which every ``MARK_EVERY``-th line of a sidecar begins.
        photos: distinct source photos.
    """

    folder: Path
    entries: Sequence[ShardEntry]
    firsts: np.ndarray
    rows: np.ndarray
    first_marks: np.ndarray
    marks: np.ndarray
    photos: int

    def places(self, indices: Sequence[int] | np.ndarray) -> tuple[list[int], list[int]]:
        """The shard of each of some samples, and the row in it.

        Raises:
            IndexError: naming the first that does not exist.
        """
        samples = np.asarray(indices, np.int64)
        outside = samples[(samples < 0) | (samples >= len(self.rows))]
        if outside.size:
            raise IndexError(f"sample {outside[0]}: expected 0 to {len(self.rows) - 1}")
        rows = self.rows[samples]
        shards = np.searchsorted(self.firsts, rows, side="right") - 1
        return shards.tolist(), (rows - self.firsts[shards]).tolist()

    def records(self, indices: Sequence[int] | np.ndarray) -> list[SampleRecord]:
        """Read the records of some samples; neighbours in one shard share one opened file."""
        places = zip(*self.places(indices), strict=True)
        records: list[SampleRecord] = []
        for shard, group in groupby(places, key=lambda place: place[0]):
            marks = self.marks[self.first_marks[shard] : self.first_marks[shard + 1]]
            sidecar = _sidecar(self.folder, self.entries[shard])
            records += read_records(sidecar, [row for _, row in group], marks)
        return records


def build_index(
    folder: Path, entries: Sequence[ShardEntry], side: Side, rule: Split
) -> SampleIndex:
    """Read every sidecar once and choose the samples of ``side``.

    Takes 14 bytes of memory per sample while it runs and 4 afterwards (8 from 2^31 samples on).

    Raises:
        FileNotFoundError: if a sidecar is missing.
        ValueError: naming the sidecar and the row, if it is damaged.
    """
    listed = None if rule.heldout_sources is None else frozenset(rule.heldout_sources)
    firsts = _cumulative([entry.samples for entry in entries])
    first_marks = _cumulative([-(-entry.samples // MARK_EVERY) for entry in entries])
    total = int(firsts[-1])
    # Memory that is never written takes no space.
    rows = np.empty(total, np.int32 if total <= np.iinfo(np.int32).max else np.int64)
    photos = np.empty(total, np.uint64)
    marks = np.empty(first_marks[-1], np.int64)
    count = 0
    for i, entry in enumerate(entries):
        file = RecordFile(_sidecar(folder, entry), entry.samples)
        marks[first_marks[i] : first_marks[i + 1]] = file.starts[::MARK_EVERY]
        names = file.photos()
        hashes = photo_hashes(names)
        if listed is None:
            heldout = hashes < _threshold(rule.heldout_fraction)
        else:
            heldout = np.array([name in listed for name in names])
        chosen = np.flatnonzero((side == "all") | (heldout == (side == "heldout")))
        filled = slice(count, count + len(chosen))
        rows[filled] = firsts[i] + chosen
        photos[filled] = hashes[chosen]
        count = filled.stop
    distinct = _count_distinct(photos[:count])
    return SampleIndex(folder, entries, firsts, rows[:count], first_marks, marks, distinct)


def photo_is_heldout(photo: str, fraction: float) -> bool:
    """Whether a photo is held out: its hash, read as a number in [0, 1), is below ``fraction``.

    A larger fraction holds out all photos that a smaller one holds out, and more.
    """
    return bool(photo_hashes([photo])[0] < _threshold(fraction))


def photo_hashes(photos: Sequence[str]) -> np.ndarray:
    """The first 64 bits of the SHA-256 of each of n > 0 names, uint64 ``[n]``."""
    # JSON escapes make every string encodable, even damaged ones, and free of line breaks.
    lines = json.dumps(list(photos), separators=("\n", ":"))[1:-1].encode().split(b"\n")
    digests = b"".join(hashlib.sha256(line).digest()[:8] for line in lines)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _threshold(fraction: float) -> np.uint64:
    """The smallest hash on the training side, for 0 <= f < 1."""
    return np.uint64(math.ceil(fraction * 2**64))  # exact: a multiplication by a power of two


def _count_distinct(values: np.ndarray) -> int:
    """Distinct numbers; sorts in place."""
    values.sort()
    return int(np.count_nonzero(values[1:] != values[:-1])) + bool(values.size)


def _cumulative(counts: Sequence[int]) -> np.ndarray:
    """Sums of the counts before each, and of all; int64 ``[n + 1]``."""
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _sidecar(folder: Path, entry: ShardEntry) -> Path:
    return (folder / entry.file).with_suffix(".jsonl")
