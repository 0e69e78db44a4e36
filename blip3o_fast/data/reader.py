"""Reading one shard: row by row, checked against its manifest entry."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.atomic import file_sha256
from blip3o_fast.data.access import RandomAccessFile
from blip3o_fast.data.manifest import ShardEntry
from blip3o_fast.data.sidecar import RecordFile
from blip3o_fast.data.tensorfile import (
    CHECK_ELEMENTS,
    bits,
    empty,
    is_finite,
    read_header,
)

TOWERS = ("eva", "clip")
"""Tensors of a shard, in file order."""


class Layout(NamedTuple):
    """What the header of a shard says.

    Attributes:
        samples, tokens, eva_width, clip_width: sizes n, T, E and C; an absent tower has width 0.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        starts: bytes of the file before ``eva`` and before ``clip``; 0 for an absent tower.
    """

    samples: int
    tokens: int
    eva_width: int
    clip_width: int
    dtype: torch.dtype
    starts: tuple[int, int]


class Shard:
    """One shard. Opening it reads its header only.

    Args:
        path: the safetensors file; its sidecar lies beside it.
        entry: what the manifest says of it; None takes the shard as it is.
        layout: contents of the header, if they are known; the header is then not read.

    Attributes:
        layout: as the header says.
        samples, tokens, eva_width, clip_width, dtype: those of the layout.
        records: the sidecar, indexable by row; read on first use.

    Raises:
        FileNotFoundError: if the file is missing; from ``records``, if the sidecar is.
        ValueError: naming the shard, if it is truncated or corrupted or is not what ``entry`` says.
    """

    def __init__(
        self,
        path: Path,
        entry: ShardEntry | None = None,
        *,
        layout: Layout | None = None,
    ) -> None:
        self.path = path
        try:
            self._file = RandomAccessFile(path)
        except FileNotFoundError:
            message = f"{path}: no such shard; the data set is incomplete"
            raise FileNotFoundError(message) from None
        if entry is not None and self._file.size != entry.bytes:
            raise ValueError(
                f"{path.name}: expected {entry.bytes} bytes, got {self._file.size}: truncated, "
                "or not the file that the manifest lists"
            )
        self.layout = _read_layout(path) if layout is None else layout
        self.samples, self.tokens, self.eva_width, self.clip_width, self.dtype, _ = self.layout
        if entry is not None and self.samples != entry.samples:
            raise ValueError(f"{path.name}: expected {entry.samples} samples, got {self.samples}")

    @cached_property
    def records(self) -> RecordFile:
        """The sidecar."""
        return RecordFile(self.path.with_suffix(".jsonl"), self.samples)

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

        ``check`` refuses NaN and Inf. The copy releases the interpreter lock.
        """
        if not 0 <= row < self.samples:
            raise IndexError(f"{self.path.name}: row {row} of {self.samples}")
        for name, out, start, row_bytes in zip(
            TOWERS, (eva, clip), self.layout.starts, self._row_bytes, strict=True
        ):
            if not out.size:
                continue
            token_bytes = row_bytes // self.tokens
            begin = start + row * row_bytes + first * token_bytes
            step = max(1, CHECK_ELEMENTS // out.shape[1]) if check else len(out)
            for token in range(0, len(out), step):
                block = out[token : token + step]
                self._file.read_into(block, begin + token * token_bytes)
                if check and not is_finite(block, self.dtype):
                    raise ValueError(
                        f"{self.path.name}: row {row} (key {self.records[row].key!r}): {name} "
                        "holds NaN or Inf"
                    )

    def fingerprints(self, rows: Iterable[int], tokens: int) -> list[bytes]:
        """A hash of the first ``tokens`` tokens of each row, all towers."""
        prints: list[bytes] = []
        for row in rows:
            digest = hashlib.blake2b(digest_size=16)
            for start, row_bytes in zip(self.layout.starts, self._row_bytes, strict=True):
                if not row_bytes:
                    continue
                head = np.empty(row_bytes // self.tokens * tokens, np.uint8)
                self._file.read_into(head, start + row * row_bytes)
                digest.update(head.data)
            prints.append(digest.digest())
        return prints

    def will_read(self, row: int) -> None:
        """Start fetching a row from the disk."""
        for start, row_bytes in zip(self.layout.starts, self._row_bytes, strict=True):
            if row_bytes:
                self._file.will_read(start + row * row_bytes, row_bytes)

    @property
    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of one row of eva and of clip."""
        token = self.tokens * self.dtype.itemsize
        return self.eva_width * token, self.clip_width * token


def _read_layout(path: Path) -> Layout:
    specs = read_header(path)
    shapes = {name: spec.shape for name, spec in specs.items()}
    same = {(shape[:2], len(shape)) for shape in shapes.values()}
    dtypes = {spec.dtype for spec in specs.values()}
    if not shapes or set(shapes) - set(TOWERS) or len(same) != 1 or len(dtypes) != 1:
        raise ValueError(
            f"{path.name}: expected eva [n, T, E] and clip [n, T, C] of one dtype, got "
            + (", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing")
        )
    sizes, rank = same.pop()
    if rank != 3 or 0 in sizes:
        raise ValueError(f"{path.name}: expected [n, T, width], got {list(shapes.values())}")
    widths = [specs[name].shape[2] if name in specs else 0 for name in TOWERS]
    starts = [specs[name].start if name in specs else 0 for name in TOWERS]
    return Layout(sizes[0], sizes[1], widths[0], widths[1], dtypes.pop(), (starts[0], starts[1]))


def verify_shards(folder: Path, entries: Iterable[ShardEntry], threads: int = 4) -> None:
    """Read shards and their sidecars once, and compare their SHA-256 with the manifest's.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming the first file that is not what the manifest lists.
    """
    with ThreadPoolExecutor(threads) as pool:
        checks = [pool.submit(_verify, folder / entry.file, entry) for entry in entries]
        try:
            for check in checks:
                check.result()
        finally:
            for check in checks:
                check.cancel()


def _verify(path: Path, entry: ShardEntry) -> None:
    sidecar = path.with_suffix(".jsonl")
    for file, expected in ((path, entry.sha256), (sidecar, entry.records_sha256)):
        digest = file_sha256(file)
        if digest != expected:
            raise ValueError(
                f"{file.name}: corrupted or replaced: expected SHA-256 {expected[:12]}..., that of "
                f"the manifest, got {digest[:12]}..."
            )
