"""A folder of shards as an indexable data set, all of it or one side of its held-out split."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.data.manifest import DTYPES, Manifest, Split, entry_path
from blip3o_fast.data.reader import Shard
from blip3o_fast.data.records import RecordFile, SampleRecord
from blip3o_fast.data.tensorfile import bits, empty

Side = Literal["train", "heldout", "all"]

_OPEN_SHARDS = 256  # each takes two file descriptors, of which processes get 1024 by default


class Batch(NamedTuple):
    """Some samples: ``eva [b, T, E]``, ``clip [b, T, C]``, and the key and source photo of each.

    A tower that the folder lacks has width 0.
    """

    eva: Tensor
    clip: Tensor
    keys: tuple[str, ...]
    sources: tuple[str, ...]


class EmbeddingDataset:
    """Samples of a finished folder of shards, numbered from 0.

    Args:
        folder: with a ``manifest.json``.
        split: ``train``, ``heldout`` or ``all``. The split goes by source photo, so crops of one
            photo stay together.
        heldout_fraction: expected share of photos held out, 0 <= f < 1, chosen by a hash of each,
            so that a photo's side does not depend on what else is in the folder. None does what
            the manifest says.
        tokens: None for the tokens as stored. One less drops the CLS token; one more puts the mean
            of the tokens in front as a stand-in for it, which ``cls`` then says.
        max_shards: use the first so many shards only.
        verify: read every shard once and compare its SHA-256 with the manifest.

    Attributes:
        manifest: as stored; the attributes below describe what ``read`` returns.
        tokens, grid, eva_width, clip_width: sizes T, (depth, height, width), E and C.
        dtype: ``torch.bfloat16``, ``torch.float16`` or ``torch.float32``.
        cls: ``none``, ``encoder`` (a real CLS token first) or ``token_mean`` (a stand-in).
        photos: distinct source photos on this side.

    Raises:
        FileNotFoundError: if the manifest or a shard is missing.
        ValueError: naming the shard or the field, for whatever disagrees, and for an empty side.
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
    ) -> None:
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"split: expected train, heldout or all, got {split!r}")
        if max_shards is not None and max_shards < 1:
            raise ValueError(f"max_shards: expected at least 1, got {max_shards}")
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self.split: Side = split
        self.grid = self.manifest.grid
        self.eva_width = self.manifest.eva_width
        self.clip_width = self.manifest.clip_width
        self.dtype: torch.dtype = DTYPES[self.manifest.dtype]
        self.tokens, self.cls = _token_layout(self.manifest, tokens)
        self._entries = self.manifest.shards[:max_shards]
        for i in range(len(self._entries)):
            self._open(i, verify=verify)
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        rule = self.manifest.split if heldout_fraction is None else Split(heldout_fraction)
        self._places, self.photos = self._select(rule)
        self._checked = np.zeros(len(self), bool)

    def __len__(self) -> int:
        return len(self._places)

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
        places = [self._place(int(index)) for index in indices]
        for shard, row in places:
            shard.will_read(row)
        skip = max(self.manifest.tokens - self.tokens, 0)
        lead = max(self.tokens - self.manifest.tokens, 0)
        eva_bits, clip_bits = bits(eva), bits(clip)
        for i, (index, (shard, row)) in enumerate(zip(indices, places, strict=True)):
            # What is mapped does not change, so a row is checked once.
            check = not self._checked[index]
            shard.copy_row(row, eva_bits[i, lead:], clip_bits[i, lead:], first=skip, check=check)
            self._checked[index] = True
        if lead:
            prepend_token_mean(eva)
            prepend_token_mean(clip)
        records = [shard.records[row] for shard, row in places]
        return Batch(eva, clip, tuple(r.key for r in records), tuple(r.photo for r in records))

    def records(self, indices: Sequence[int] | np.ndarray) -> list[SampleRecord]:
        """Key, caption and source of some samples."""
        places = [self._place(int(index)) for index in indices]
        return [shard.records[row] for shard, row in places]

    def _place(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: expected 0 to {len(self) - 1}")
        shard, row = self._places[index]
        return self._shard(int(shard)), int(row)

    def _open(self, i: int, *, verify: bool = False) -> Shard:
        entry = self._entries[i]
        shard = Shard(entry_path(self.folder, entry), entry, verify=verify)
        facts = self.manifest
        expected = (facts.tokens, facts.eva_width, facts.clip_width, DTYPES[facts.dtype])
        got = (shard.tokens, shard.eva_width, shard.clip_width, shard.dtype)
        if got != expected:
            raise ValueError(
                f"{entry.file}: expected (tokens, eva_width, clip_width, dtype) {expected}, got "
                f"{got}: manifest and shard disagree"
            )
        return shard

    def _select(self, rule: Split) -> tuple[np.ndarray, int]:
        """(shard, row) of each sample of this side, int32 [samples, 2]; the number of photos."""
        heldout = set(rule.heldout_sources or ())
        chosen: list[tuple[int, int]] = []
        photos: set[str] = set()
        for i, entry in enumerate(self._entries):
            records = RecordFile(
                entry_path(self.folder, entry).with_suffix(".jsonl"), entry.samples
            )
            for row in range(entry.samples):
                photo = records[row].photo
                if rule.heldout_sources is None:
                    out = photo_is_heldout(photo, rule.heldout_fraction)
                else:
                    out = photo in heldout
                if self.split == "all" or out == (self.split == "heldout"):
                    chosen.append((i, row))
                    photos.add(photo)
        if not chosen:
            total = sum(entry.samples for entry in self._entries)
            raise ValueError(
                f"{self.folder}: expected {self.split} samples, got none of {total} with "
                + ("the manifest's list" if heldout else f"fraction {rule.heldout_fraction}")
                + " held out; choose another heldout_fraction or add photos"
            )
        return np.array(chosen, np.int32), len(photos)


def photo_is_heldout(photo: str, fraction: float) -> bool:
    """Whether a photo is held out: a hash of its name, read as a number in [0, 1), is below f.

    A larger fraction keeps every photo held out that a smaller one held out.
    """
    # JSON escapes make any string hashable, damaged ones included.
    digest = hashlib.sha256(json.dumps(photo).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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
