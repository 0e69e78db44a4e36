"""Shards of paired embeddings, written whole or not at all.

A shard is a safetensors file with ``eva [n, T, E]`` and ``clip [n, T, C]`` (either may be absent,
and then has width 0) and a sidecar of n records. ``ShardWriter`` updates a part manifest,
``manifest.part-<part>.json``, after every shard; an interrupted writer resumes from it. The
manifest itself, which makes the folder a data set, is written last.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from blip3o_fast.atomic import file_sha256, locked, remove_leftovers, write_atomically
from blip3o_fast.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, entry_path
from blip3o_fast.data.parts import merge_parts, part_path, read_parts
from blip3o_fast.data.reader import TOWERS, Shard
from blip3o_fast.data.sidecar import RecordFile, SampleRecord, check_record, encode_records
from blip3o_fast.data.tensorfile import RowWriter, bits, is_finite
from blip3o_fast.devices import DTYPES

__all__ = ["SampleRecord", "Shard", "ShardWriter"]

_NUMBERED = re.compile(r"(shard_(?:[A-Za-z][A-Za-z0-9]*_)?)(\d+)\.safetensors")


class ShardWriter:
    """Appends samples to a folder of shards.

    Use it as a context manager: leaving it without an exception finishes the data set, leaving it
    with one drops the shard in progress and keeps the finished ones for a later ``resume``.

    Args:
        folder: created if need be.
        facts: a ``Manifest`` without shards: sizes, dtype, encoders, split, notes.
        samples_per_shard: rows of a full shard.
        resume: go on in a folder that holds shards of the same facts; their keys are in ``done``.
        part: a name of letters and digits that begins with a letter. Processes that write one
            folder together need different ones; a single process needs none. None: ``begin`` names
            one part after another, and whoever holds the folder removes what killed writers left.
        merge: write the manifest at the end, and keep other writers out of the folder until then.
            With several parts it is off: whoever starts them holds ``locked(folder)``, and calls
            ``merge_parts`` once all are finished.

    Attributes:
        done: keys that the folder holds already, those of the shard in progress included.
        digests: what rows of an earlier run were made from, by key, where that was recorded.
        entries: shards of earlier runs.
        notes: added to the manifest's notes when the writer finishes.

    Raises:
        OptionError: if another process writes to the folder.
        ValueError: if the folder holds shards and ``resume`` is off, or shards of other facts.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        facts: Manifest,
        samples_per_shard: int = 256,
        resume: bool = False,
        part: str | None = "",
        merge: bool = True,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard: expected at least 1, got {samples_per_shard}")
        if not re.fullmatch("([A-Za-z][A-Za-z0-9]*)?", part or ""):
            raise ValueError(f"part: expected a letter, then letters and digits, got {part!r}")
        self.folder = Path(folder)
        self.facts = facts.replace(shards=())
        self.samples_per_shard = samples_per_shard
        self.done: set[str] = set()
        self.digests: dict[str, str] = {}
        self.entries: list[ShardEntry] = []
        self.notes: dict[str, Any] = {}
        self._merge = merge
        self._name(part or "")
        self._part = self.facts
        self._numbers: dict[str, int] = {}  # of the next shard by prefix
        self._writer: RowWriter | None = None
        self._records: list[SampleRecord] = []
        self._lock = contextlib.ExitStack()
        if merge:
            self._lock.enter_context(locked(self.folder))
        try:
            self._take_over(resume)
        except BaseException:
            self._lock.close()
            raise
        self.folder.mkdir(parents=True, exist_ok=True)
        if part is not None:
            remove_leftovers(self.folder, f"{self._prefix}[0-9]*")
            remove_leftovers(self.folder, self._part_path.name)

    def listed(self, part: str) -> Manifest:
        """What a part lists so far."""
        path = part_path(self.folder, part)
        return Manifest.read(path) if path.is_file() else self.facts

    def take_over(self, part: str) -> None:
        """Read what a part holds, which its writer left since this one was made."""
        self._learn(part_path(self.folder, part), self.listed(part))

    def begin(self, part: str) -> None:
        """Add to another part from here on; the last one has ended."""
        assert self._writer is None
        self._name(part)
        self._part = self.listed(part)

    def end(self, notes: Mapping[str, Any]) -> None:
        """Finish the last shard of this part, and leave notes in what it lists."""
        self.flush()
        self._part = self._part.replace(notes=dict(notes))
        self._part.write(self._part_path)

    def add(self, eva: Tensor | None, clip: Tensor | None, records: Sequence[SampleRecord]) -> None:
        """Append b samples: ``eva [b, T, E]``, ``clip [b, T, C]``, None for an absent tower.

        The tensors are cast to the manifest's dtype. All rows are checked before any is written.

        Raises:
            ValueError: for a wrong shape, a key already written, or a NaN or Inf (after the cast),
                naming the shard, the row and the key.
            OSError: naming the file, if it cannot be written; the shard in progress is dropped.
        """
        rows = self._checked(eva, clip, records)
        start = 0
        while start < len(records):
            if self._writer is None:
                self._writer = self._open_shard()
            stop = min(len(records), start + self.samples_per_shard - self._writer.rows)
            try:
                self._writer.append({name: patterns[start:stop] for name, patterns in rows.items()})
            except OSError:
                self.discard()
                raise
            self._records.extend(records[start:stop])
            self.done.update(record.key for record in records[start:stop])
            if self._writer.rows == self.samples_per_shard:
                self.flush()
            start = stop

    def flush(self) -> None:
        """Finish the shard in progress, full or not; later failures do not affect it."""
        if self._writer is None:
            return
        name = self._shard_name()
        sidecar = (self.folder / name).with_suffix(".jsonl")
        data = encode_records(self._records)
        try:
            write_atomically(sidecar, data)
            size, digest = self._writer.commit()
        except OSError:
            # Readers ignore files that no manifest lists, but they take up space.
            for path in (sidecar, self.folder / name):
                path.unlink(missing_ok=True)
            self.discard()
            raise
        written = ShardEntry(name, len(self._records), size, digest, file_sha256(sidecar))
        self._part = self._part.replace(shards=(*self._part.shards, written))
        self._writer, self._records = None, []
        self._numbers[self._prefix] = self._number + 1
        # If this fails, the list on disk is the old or the new one; both are consistent.
        self._part.write(self._part_path)

    def discard(self) -> None:
        """Drop the shard in progress; the finished ones stay for a later ``resume``."""
        if self._writer is not None:
            self._writer.discard()
            self.done.difference_update(record.key for record in self._records)
            self._writer, self._records = None, []

    def finish(self) -> None:
        """Finish the last shard and, unless ``merge`` is off, write the manifest.

        Raises:
            ValueError: if the folder would hold no samples at all.
        """
        self.end({**self._part.notes, **self.notes})
        if self._merge:
            merge_parts(self.folder)
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()
            self._lock.close()

    def _name(self, part: str) -> None:
        self._prefix = f"shard_{part}_" if part else "shard_"
        self._part_path = part_path(self.folder, part or "0")

    def _take_over(self, resume: bool) -> None:
        """Read what the folder holds."""
        found = read_parts(self.folder)
        # Parts of other names may belong to other processes that write at the same time.
        own = found if self._prefix == "shard_" else {self.folder / MANIFEST_NAME, self._part_path}
        blocking = [manifest for path, manifest in found.items() if path in own]
        if blocking and not resume:
            raise ValueError(
                f"{self.folder}: already holds {sum(m.samples for m in blocking)} samples; "
                "resume, or choose an empty folder"
            )
        for path, manifest in found.items():
            self._learn(path, manifest)
        self._part = found.get(self._part_path, self.facts)

    def _learn(self, path: Path, manifest: Manifest) -> None:
        self.facts.require_facts(
            manifest,
            f"{path}: another data set:",
            "; repeat the options that it was made with, or choose an empty folder",
        )
        for entry in manifest.shards:
            sidecar = entry_path(self.folder, entry).with_suffix(".jsonl")
            file = RecordFile(sidecar, entry.samples)
            records = [file[row] for row in range(len(file))]
            self.done.update(record.key for record in records)
            self.entries.append(entry)
            self.digests.update((r.key, r.digest) for r in records if r.digest)
            match = _NUMBERED.fullmatch(entry.file)
            if match:
                beyond = int(match[2]) + 1
                self._numbers[match[1]] = max(self._numbers.get(match[1], 0), beyond)

    @property
    def _number(self) -> int:
        """Of the shard in progress."""
        return self._numbers.get(self._prefix, 0)

    def _shard_name(self) -> str:
        return f"{self._prefix}{self._number:05d}.safetensors"

    def _open_shard(self) -> RowWriter:
        widths = {"eva": self.facts.eva_width, "clip": self.facts.clip_width}
        shapes = {name: (self.facts.tokens, width) for name, width in widths.items() if width}
        return RowWriter(
            self.folder / self._shard_name(),
            shapes,
            DTYPES[self.facts.dtype],
            self.samples_per_shard,
        )

    def _checked(
        self, eva: Tensor | None, clip: Tensor | None, records: Sequence[SampleRecord]
    ) -> dict[str, np.ndarray]:
        if not records:
            raise ValueError("records: expected at least one sample, got none")
        keys: set[str] = set()
        for record in records:
            check_record(record, where="records")
            if record.key in self.done or record.key in keys:
                raise ValueError(f"records: key {record.key!r} was already written")
            keys.add(record.key)
        rows: dict[str, np.ndarray] = {}
        widths = (self.facts.eva_width, self.facts.clip_width)
        for name, x, width in zip(TOWERS, (eva, clip), widths, strict=True):
            if width == 0 and (x is None or x.shape[-1] == 0):
                continue
            expected = [len(records), self.facts.tokens, width]
            if width == 0 or x is None or list(x.shape) != expected or not x.is_floating_point():
                got = None if x is None else f"{list(x.shape)} of {x.dtype}"
                raise ValueError(
                    f"{name}: expected {expected if width else None} of floating point, got {got}"
                )
            rows[name] = bits(x.detach().to("cpu", DTYPES[self.facts.dtype]).contiguous())
            self._require_finite(name, rows[name], records)
        return rows

    def _require_finite(
        self, name: str, patterns: np.ndarray, records: Sequence[SampleRecord]
    ) -> None:
        for i, (row, record) in enumerate(zip(patterns, records, strict=True)):
            if not is_finite(row, DTYPES[self.facts.dtype]):
                position = len(self._records) + i
                raise ValueError(
                    f"{self._prefix}{self._number + position // self.samples_per_shard:05d}: row "
                    f"{position % self.samples_per_shard} (key {record.key!r}): {name} holds NaN, "
                    f"Inf or a value beyond the range of {self.facts.dtype}"
                )
