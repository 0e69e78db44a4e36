"""The sidecar of a shard: one JSON line per sample.

Each line is ``{"key": "coco_139", "caption": "A woman ...", "source": "000000000139.jpg"}``. The
source names the photo that the sample was cut from. The held-out split is made by source, so crops
of one photo never fall on both sides. A record may also hold the ``digest`` of what its row was
made from, by which a resumed extraction sees that an image was replaced.
"""

import json
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip3o_fast.checked import json_object

MARK_EVERY = 64
"""The start of every line with this distance is kept in memory."""

_NEWLINE = 10


class SampleRecord(NamedTuple):
    """What is known of one sample besides its embeddings.

    Attributes:
        key: its name, unique within a data set and not empty.
        caption: text, possibly empty.
        source: photo that it was cut from; empty means that ``key`` is the photo.
        digest: of the bytes that it was made from; empty where nobody recorded it.
    """

    key: str
    caption: str = ""
    source: str = ""
    digest: str = ""

    @property
    def photo(self) -> str:
        """The name that decides the side of the held-out split."""
        return self.source or self.key


_FIELDS = frozenset(SampleRecord._fields)


def encode_records(records: Iterable[SampleRecord]) -> bytes:
    """The sidecar in ASCII, so that lone surrogates of damaged captions survive as escapes."""
    lines = (
        {name: text for name, text in record._asdict().items() if text or name != "digest"}
        for record in records
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def decode_record(line: bytes, where: str) -> SampleRecord:
    """One line of a sidecar; errors begin with ``where``."""
    try:
        values = json_object("record", json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: corrupted record: {error}") from error
    unknown = sorted(values.keys() - _FIELDS)
    if unknown:
        known = ", ".join(SampleRecord._fields)
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {known}")
    return check_record(SampleRecord(values.pop("key", None), **values), where)


def check_record(record: SampleRecord, where: str) -> SampleRecord:
    """``record``, if it is all strings and the key is not empty; errors begin with ``where``."""
    if not isinstance(record.key, str) or not record.key:
        raise ValueError(f"{where}: expected a key, got {record.key!r}")
    for text in record:
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected strings, got {reprlib.repr(text)}")
    return record


def read_records(path: Path, rows: Iterable[int], marks: np.ndarray) -> Iterator[SampleRecord]:
    """Some records of a sidecar, without reading the others.

    Args:
        path: the ``.jsonl`` file.
        rows: in ascending order for the fewest reads.
        marks: byte at which every ``MARK_EVERY``-th line begins.
    """
    with path.open("rb") as file:
        at = len(marks) * MARK_EVERY  # the row whose line comes next; beyond the last: none yet
        for row in rows:
            if not at <= row < at + MARK_EVERY:
                at = row - row % MARK_EVERY
                file.seek(int(marks[row // MARK_EVERY]))
            for _ in range(row - at):
                file.readline()
            at = row + 1
            yield decode_record(file.readline(), f"{path.name}, row {row}")


class RecordFile:
    """A sidecar in memory; lines are parsed on use.

    Args:
        path: the ``.jsonl`` file.
        samples: lines expected.

    Attributes:
        starts: byte at which each line begins, int64 ``[samples]``.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it holds another number of lines.
    """

    def __init__(self, path: Path, samples: int) -> None:
        self.path = path
        try:
            self._data = path.read_bytes()
        except FileNotFoundError:
            message = f"{path}: no such sidecar; expected {samples} records"
            raise FileNotFoundError(message) from None
        ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == _NEWLINE) + 1
        if len(ends) != samples or (samples and ends[-1] != len(self._data)):
            raise ValueError(f"{path.name}: expected {samples} records, got {len(ends)}: truncated")
        self._bounds = np.concatenate(([0], ends))
        self.starts = self._bounds[:-1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> SampleRecord:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path.name}: row {row} of {len(self)}")
        line = self._data[self._bounds[row] : self._bounds[row + 1]]
        return decode_record(line, f"{self.path.name}, row {row}")

    def photos(self) -> list[str]:
        """The photo of every row; every line is parsed and checked."""
        try:
            # One call for all lines is three times as fast as one call per line. JSON strings
            # contain no line breaks.
            values = json.loads(b"[" + self._data[:-1].replace(b"\n", b",") + b"]")
        except (ValueError, RecursionError):
            values = []
        if len(values) != len(self) or not all(map(_is_record, values)):
            return [self[row].photo for row in range(len(self))]  # says which line is wrong
        return [value.get("source") or value["key"] for value in values]


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= _FIELDS
        and all(isinstance(text, str) for text in value.values())
        and bool(value.get("key"))
    )
