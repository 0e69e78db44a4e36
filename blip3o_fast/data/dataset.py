"""A folder of shards as an indexable data set, all of it or one side of its held-out split."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.data.index import SampleIndex, Side, build_index, photo_is_heldout
from blip3o_fast.data.manifest import Manifest, ShardEntry, Split
from blip3o_fast.data.reader import Layout, Shard, verify_shards
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.data.tensorfile import bits, empty
from blip3o_fast.devices import DTYPES

__all__ = ["Batch", "EmbeddingDataset", "BatchRecords", "Side", "photo_is_heldout"]

_OPEN_SHARDS = 256  # a quarter of the 1024 files that a process may usually open
_MOST_OPEN_SHARDS = 4096  # open files take memory, and a node runs many processes


class BatchRecords:
    """The records of some samples, read on first use."""

    def __init__(self, index: SampleIndex, indices: Sequence[int] | np.ndarray) -> None:
        self._index = index
        self._indices = np.array(indices, np.int64)
        self._read: tuple[SampleRecord, ...] | None = None

    def read(self) -> tuple[SampleRecord, ...]:
        """One record per sample, in the order of the batch."""
        if self._read is None:
            self._read = tuple(self._index.records(self._indices))
        return self._read


class Batch(NamedTuple):
    """Some samples: ``eva [b, T, E]``, ``clip [b, T, C]``, and the record of each.

    A tower that the folder lacks has width 0. The first use of ``keys`` or ``sources`` reads
    sidecars from the disk, so avoid them where speed matters.
    """

    eva: Tensor
    clip: Tensor
    records: BatchRecords

    @property
    def keys(self) -> tuple[str, ...]:
        """The key of each sample."""
        return tuple(record.key for record in self.records.read())

    @property
    def sources(self) -> tuple[str, ...]:
        """The source photo of each sample."""
        return tuple(record.photo for record in self.records.read())


class EmbeddingDataset:
    """Samples of a finished folder of shards, numbered from 0.

    Args:
        folder: with a ``manifest.json``.
        split: ``train``, ``heldout`` or ``all``. The split goes by source photo, so crops of one
            photo stay together.
        heldout_fraction: expected share of photos held out, 0 <= f < 1. A hash of its name decides
            the side of each photo, whatever else is in the folder. None follows the manifest.
        tokens: None for the tokens as stored. One less drops the CLS token. One more puts the mean
            of the tokens in front in its place; ``cls`` is then ``token_mean``.
        max_shards: use the first so many shards only.
        verify: read every shard once and compare its SHA-256 with the manifest.
        open_shards: most files kept open between reads. None: a quarter of the files that the
            process may open (256 of the usual 1024), at most 4096.

    Attributes:
        manifest: as stored; the attributes below describe what ``read`` returns.
        tokens, grid, eva_width, clip_width: sizes T, (depth, height, width), E and C.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        cls: ``none``, ``encoder`` (a real CLS token first) or ``token_mean`` (a stand-in).

    Raises:
        FileNotFoundError: if the manifest or a shard is missing.
        ValueError: naming the shard or the field, if they contradict each other, or the side is
            empty.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split: Side = "all",
        heldout_fraction: float | None = None,
        tokens: int | None = None,
        max_shards: int | None = None,
        verify: bool = False,
        open_shards: int | None = None,
    ) -> None:
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"split: expected train, heldout or all, got {split!r}")
        if max_shards is not None and max_shards < 1:
            raise ValueError(f"max_shards: expected at least 1, got {max_shards}")
        if open_shards is not None and open_shards < 1:
            raise ValueError(f"open_shards: expected at least 1, got {open_shards}")
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self.split: Side = split
        self.grid = self.manifest.grid
        self.eva_width = self.manifest.eva_width
        self.clip_width = self.manifest.clip_width
        self.dtype: torch.dtype = DTYPES[self.manifest.dtype]
        self.tokens, self.cls = _token_layout(self.manifest, tokens)
        entries = self.manifest.shards[:max_shards]
        starts = np.empty((len(entries), 2), np.int64)
        for i, entry in enumerate(entries):
            starts[i] = _check_shard(self.folder, self.manifest, entry)
        if verify:
            verify_shards(self.folder, entries)
        limit = _default_open_shards() if open_shards is None else open_shards
        reopen = partial(_reopen, self.folder, self.manifest, starts)
        self._shard = lru_cache(maxsize=limit)(reopen)
        rule = self.manifest.split if heldout_fraction is None else Split(heldout_fraction)
        self._index = build_index(self.folder, entries, split, rule)
        if not len(self):
            held_out = (
                "the manifest's list"
                if rule.heldout_sources
                else f"fraction {rule.heldout_fraction}"
            )
            raise ValueError(
                f"{self.folder}: expected {split} samples, got none of {self._index.firsts[-1]} "
                f"with {held_out} held out; choose another heldout_fraction or add photos"
            )
        self._checked = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._index.rows)

    @property
    def photos(self) -> int:
        """Distinct source photos on this side, counted by 64-bit hashes of their names."""
        return self._index.photos

    @property
    def has_cls(self) -> bool:
        """Whether token 0 is a CLS token or its stand-in."""
        return self.cls != "none"

    def read(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Copies of some samples, on the CPU, in the stored dtype.

        Raises:
            IndexError: for an index outside the data set.
            ValueError: naming the shard, the row and the key, if one holds NaN or Inf.
        """
        eva = empty((len(indices), self.tokens, self.eva_width), self.dtype)
        clip = empty((len(indices), self.tokens, self.clip_width), self.dtype)
        return self.read_into(indices, eva, clip)

    def read_into(self, indices: Sequence[int] | np.ndarray, eva: Tensor, clip: Tensor) -> Batch:
        """``read`` into contiguous CPU tensors of the right shape and dtype, and return them."""
        shards, rows = self._index.places(indices)
        places = [(self._shard(shard), row) for shard, row in zip(shards, rows, strict=True)]
        for shard, row in places:
            shard.will_read(row)
        skip = max(self.manifest.tokens - self.tokens, 0)
        lead = max(self.tokens - self.manifest.tokens, 0)
        eva_bits, clip_bits = bits(eva), bits(clip)
        for i, (index, (shard, row)) in enumerate(zip(indices, places, strict=True)):
            # A finished shard does not change, so each row is checked only once.
            check = not self._checked[index]
            shard.copy_row(row, eva_bits[i, lead:], clip_bits[i, lead:], first=skip, check=check)
            self._checked[index] = True
        if lead:
            prepend_token_mean(eva)
            prepend_token_mean(clip)
        return Batch(eva, clip, BatchRecords(self._index, indices))

    def records(self, indices: Sequence[int] | np.ndarray) -> list[SampleRecord]:
        """Key, caption and source of some samples."""
        return self._index.records(indices)


def prepend_token_mean(x: Tensor) -> None:
    """Fill token 0 of ``x [b, T, W]`` with the mean of the others, in place (fp32 sum)."""
    x[:, 0] = x[:, 1:].mean(1, dtype=torch.float32)


def _token_layout(
    manifest: Manifest, tokens: int | None
) -> tuple[int, Literal["none", "encoder", "token_mean"]]:
    stored = manifest.tokens
    if tokens in (None, stored):
        if not manifest.has_cls:
            return stored, "none"
        return stored, "token_mean" if manifest.notes.get("cls") == "token_mean" else "encoder"
    if tokens == stored - 1 and manifest.has_cls:
        return stored - 1, "none"
    if tokens == stored + 1 and not manifest.has_cls:
        return stored + 1, "token_mean"
    expected = stored - 1 if manifest.has_cls else stored + 1
    raise ValueError(
        f"tokens: expected {stored}, or {expected} "
        f"({'without its CLS token' if manifest.has_cls else 'with a token mean in front'}), "
        f"got {tokens}"
    )


def _check_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> tuple[int, int]:
    """Check the header of a shard; returns where its towers begin."""
    layout = Shard(folder / entry.file, entry).layout
    expected = (manifest.tokens, manifest.eva_width, manifest.clip_width, DTYPES[manifest.dtype])
    got = (layout.tokens, layout.eva_width, layout.clip_width, layout.dtype)
    if got != expected:
        raise ValueError(
            f"{entry.file}: expected (tokens, eva_width, clip_width, dtype) {expected}, got "
            f"{got}: manifest and shard disagree"
        )
    return layout.starts


def _reopen(folder: Path, manifest: Manifest, starts: np.ndarray, i: int) -> Shard:
    """Open shard ``i``, whose header was checked before; only its size is checked again."""
    entry = manifest.shards[i]
    layout = Layout(
        entry.samples,
        manifest.tokens,
        manifest.eva_width,
        manifest.clip_width,
        DTYPES[manifest.dtype],
        (int(starts[i, 0]), int(starts[i, 1])),
    )
    return Shard(folder / entry.file, entry, layout=layout)


def _default_open_shards() -> int:
    """A quarter of the files that this process may open."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return _OPEN_SHARDS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _OPEN_SHARDS
        if soft == resource.RLIM_INFINITY
        else min(_MOST_OPEN_SHARDS, max(1, soft // 4))
    )
