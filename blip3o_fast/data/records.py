"""The sidecar of a shard: one JSON line a sample.

Each line is ``{"key": "coco_139", "caption": "A woman ...", "source": "000000000139.jpg"}``. The
source names the photo that the sample was cut from; the held-out split goes by it, so crops of one
photo never fall on both sides.
"""

import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip3o_fast.data.fields import json_object

_NEWLINE = 10


class SampleRecord(NamedTuple):
    """What is known of one sample besides its embeddings.

    Attributes:
        key: its name, unique within a data set and not empty.
        caption: text, possibly empty.
        source: photo that it was cut from; empty means that ``key`` is the photo.
    """

    key: str
    caption: str = ""
    source: str = ""

    @property
    def photo(self) -> str:
        """The name that the held-out split goes by."""
        return self.source or self.key


def encode_records(records: Iterable[SampleRecord]) -> bytes:
    """The sidecar's bytes, in ASCII: lone surrogates of damaged captions survive as escapes."""
    return b"".join(json.dumps(record._asdict()).encode() + b"\n" for record in records)


def decode_record(line: bytes, where: str) -> SampleRecord:
    """One line of a sidecar; errors begin with ``where``."""
    try:
        values = json_object("record", json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: corrupted record: {error}") from error
    unknown = sorted(values.keys() - set(SampleRecord._fields))
    if unknown:
        known = ", ".join(SampleRecord._fields)
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {known}")
    return check_record(
        values.get("key"), values.get("caption", ""), values.get("source", ""), where
    )


def check_record(key: Any, caption: Any, source: Any, where: str) -> SampleRecord:
    """A record of three strings, the first not empty; errors begin with ``where``."""
    if not isinstance(key, str) or not key:
        raise ValueError(f"{where}: expected a key, got {key!r}")
    if not isinstance(caption, str) or not isinstance(source, str):
        raise ValueError(f"{where}: expected strings, got {caption!r} and {source!r}")
    return SampleRecord(key, caption, source)


class RecordFile:
    """A sidecar, memory-mapped; lines are parsed when they are asked for.

    Args:
        path: the ``.jsonl`` file.
        samples: lines expected.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it holds another number of lines.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such sidecar; expected {samples} records")
        with path.open("rb") as file:
            empty = path.stat().st_size == 0
            self._map = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ends = np.flatnonzero(np.frombuffer(self._map, np.uint8) == _NEWLINE) + 1
        if len(ends) != samples or (samples and ends[-1] != len(self._map)):
            raise ValueError(f"{path.name}: expected {samples} records, got {len(ends)}: truncated")
        self._ends = np.concatenate(([0], ends))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> SampleRecord:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path.name}: row {row} of {len(self)}")
        line = self._map[self._ends[row] : self._ends[row + 1]]
        return decode_record(line, f"{self.path.name}, row {row}")
