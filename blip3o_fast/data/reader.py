"""Reading one shard: memory-mapped, row by row, checked against its manifest entry."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from blip3o_fast.data.manifest import ShardEntry
from blip3o_fast.data.records import RecordFile
from blip3o_fast.data.tensorfile import (
    CHECK_ELEMENTS,
    MappedFile,
    bits,
    empty,
    file_sha256,
    is_finite,
)

TOWERS = ("eva", "clip")
"""Tensors of a shard, in file order."""


class Shard:
    """One shard, memory-mapped: nothing is read before it is asked for.

    Args:
        path: the safetensors file; its sidecar lies beside it.
        entry: what the manifest says of it; None takes the shard as it is.
        verify: read both files once and compare their SHA-256 with ``entry``.

    Attributes:
        samples, tokens, eva_width, clip_width: sizes n, T, E and C; an absent tower has width 0.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        records: the sidecar, indexable by row.

    Raises:
        FileNotFoundError: if either file is missing.
        ValueError: naming the shard, if it is truncated or corrupted or is not what ``entry`` says.
    """

    def __init__(
        self, path: Path, entry: ShardEntry | None = None, *, verify: bool = False
    ) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such shard; the data set is incomplete")
        if entry is not None and path.stat().st_size != entry.bytes:
            raise ValueError(
                f"{path.name}: expected {entry.bytes} bytes, got {path.stat().st_size}: truncated, "
                "or not the file that the manifest lists"
            )
        if verify:
            _verify(path, entry)
        self._file = MappedFile(path)
        shapes = {name: spec.shape for name, spec in self._file.specs.items()}
        same = {(shape[:2], len(shape)) for shape in shapes.values()}
        dtypes = {spec.dtype for spec in self._file.specs.values()}
        if not shapes or set(shapes) - set(TOWERS) or len(same) != 1 or len(dtypes) != 1:
            raise ValueError(
                f"{path.name}: expected eva [n, T, E] and clip [n, T, C] of one dtype, got "
                + (
                    ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
                    or "nothing"
                )
            )
        (self.samples, self.tokens), rank = same.pop()
        if rank != 3 or not self.samples or not self.tokens:
            raise ValueError(f"{path.name}: expected [n, T, width], got {list(shapes.values())}")
        if entry is not None and self.samples != entry.samples:
            raise ValueError(f"{path.name}: expected {entry.samples} samples, got {self.samples}")
        self.dtype = dtypes.pop()
        self.eva_width = shapes["eva"][2] if "eva" in shapes else 0
        self.clip_width = shapes["clip"][2] if "clip" in shapes else 0
        self.records = RecordFile(path.with_suffix(".jsonl"), self.samples)

    def read(self, rows: slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of some rows: ``eva [b, T, E]`` and ``clip [b, T, C]`` in the shard's dtype.

        Raises:
            ValueError: naming the row and its key, if one holds NaN or Inf.
        """
        chosen = range(self.samples)[rows] if isinstance(rows, slice) else rows
        eva = empty((len(chosen), self.tokens, self.eva_width), self.dtype)
        clip = empty((len(chosen), self.tokens, self.clip_width), self.dtype)
        for i, row in enumerate(chosen):
            self.copy_row(row, bits(eva)[i], bits(clip)[i])
        return eva, clip

    def copy_row(
        self, row: int, eva: np.ndarray, clip: np.ndarray, *, first: int = 0, check: bool = True
    ) -> None:
        """Copy tokens ``first:`` of one row into bit-pattern arrays ``[T - first, width]``.

        ``check`` refuses NaN and Inf. The interpreter lock is free during the copy.
        """
        if not 0 <= row < self.samples:
            raise IndexError(f"{self.path.name}: row {row} of {self.samples}")
        for name, out in zip(TOWERS, (eva, clip), strict=True):
            if not out.size:
                continue
            stored = self._file.arrays[name][row, first:]
            step = max(1, CHECK_ELEMENTS // out.shape[1]) if check else len(out)
            for start in range(0, len(out), step):
                block = out[start : start + step]
                np.copyto(block, stored[start : start + step])
                if check and not is_finite(block, self.dtype):
                    raise ValueError(
                        f"{self.path.name}: row {row} (key {self.records[row].key!r}): {name} "
                        "holds NaN or Inf"
                    )

    def fingerprints(self, rows: Iterable[int], tokens: int) -> list[bytes]:
        """A hash of the first ``tokens`` tokens of each row, all towers."""
        prints: list[bytes] = []
        # Not through the map, which would pull in far more than these few bytes a row.
        with self.path.open("rb") as file:
            for row in rows:
                digest = hashlib.blake2b(digest_size=16)
                for spec in self._file.specs.values():
                    row_bytes = (spec.stop - spec.start) // self.samples
                    file.seek(spec.start + row * row_bytes)
                    digest.update(file.read(row_bytes // self.tokens * tokens))
                prints.append(digest.digest())
        return prints

    def will_read(self, row: int) -> None:
        """Start fetching a row from the disk."""
        for name in self._file.specs:
            self._file.will_read(name, row)


def _verify(path: Path, entry: ShardEntry | None) -> None:
    if entry is None:
        raise ValueError(f"{path.name}: only a manifest entry can be verified against")
    sidecar = path.with_suffix(".jsonl")
    for file, expected in ((path, entry.sha256), (sidecar, entry.records_sha256)):
        digest = file_sha256(file)
        if digest != expected:
            raise ValueError(
                f"{file.name}: corrupted: expected SHA-256 {expected[:12]}..., got {digest[:12]}..."
            )
