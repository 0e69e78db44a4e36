"""Conversion of other formats to shards: stream and verify.

Embeddings pass through memory in blocks, so files may be larger than memory. An interrupted
conversion continues where it stopped; first it compares what it wrote with the source, so that no
data set is made of two sources.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.data.conversion_plan import ConversionPlan, Wishes, open_sources, plan_conversion
from blip3o_fast.data.conversion_sources import Source
from blip3o_fast.data.dataset import prepend_token_mean
from blip3o_fast.data.manifest import Manifest, ShardEntry, entry_path
from blip3o_fast.data.reader import TOWERS, Shard, verify_shards
from blip3o_fast.data.shards import ShardWriter
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.data.tensorfile import bits, is_finite
from blip3o_fast.devices import DTYPES

_BLOCK_BYTES = 1 << 24  # embeddings of both towers in memory at a time
_LISTED = 20  # keys named in a remark


@dataclass
class Outcome:
    """Samples that a conversion wrote, found already written, and skipped for NaN or Inf."""

    written: int = 0
    done: int = 0
    skipped: list[str] = field(default_factory=list)


def convert(
    source: Path,
    folder: Path,
    wishes: Wishes | None = None,
    *,
    samples_per_shard: int = 256,
) -> Outcome:
    """Convert and verify in one call; see ``open_sources`` for what ``source`` may be.

    Examples:
        >>> convert(Path("coco_embeddings_consolidated.pkl"), Path("coco"))
    """
    plan = plan_conversion(open_sources(source), wishes or Wishes())
    outcome = write_planned(plan, folder, samples_per_shard=samples_per_shard)
    verify_conversion(plan, folder)
    return outcome


def write_planned(
    plan: ConversionPlan,
    folder: Path,
    *,
    samples_per_shard: int = 256,
    skip_bad_rows: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Outcome:
    """Write the planned samples, or those that an interrupted conversion left unwritten.

    Args:
        folder: of the shards.
        samples_per_shard: rows of a full shard.
        skip_bad_rows: leave out rows with NaN or Inf instead of stopping at the first.
        progress: called with the number of samples that were just handled.

    Raises:
        ValueError: for a row with NaN or Inf, naming source, row and key; if the folder holds
            another data set, or rows that the source no longer has; if the disk lacks the space.
    """
    outcome = Outcome()
    with ShardWriter(
        folder, facts=plan.facts, samples_per_shard=samples_per_shard, resume=True
    ) as writer:
        planned = {record.key for picked in plan.samples for _, record in picked}
        foreign = writer.done - planned
        if foreign:
            raise ValueError(
                f"{folder}: holds {len(foreign)} samples that the source lacks, such as "
                f"{min(foreign)!r}; choose an empty folder"
            )
        _require_same_source(plan, folder, writer.entries)
        outcome.done = len(writer.done)
        _require_space(folder, (plan.count - outcome.done) * plan.facts.sample_bytes)
        progress(outcome.done)
        for source, picked in zip(plan.sources, plan.samples, strict=True):
            left = [item for item in picked if item[1].key not in writer.done]
            for block in _blocks(source, left):
                towers = read_rows(plan.facts, source, block[0][0], block[-1][0] + 1)
                good = _finite(source, block, towers, outcome.skipped, skip_bad_rows)
                if good:
                    eva, clip = (None if x is None else x[good] for x in towers)
                    writer.add(eva, clip, [block[i][1] for i in good])
                outcome.written += len(good)
                progress(len(block))
        writer.notes["skipped_rows"] = outcome.skipped
    return outcome


def verify_conversion(plan: ConversionPlan, folder: Path, rows: int = 64) -> list[str]:
    """Check every shard's SHA-256, and ``rows`` samples bit by bit against the source.

    Returns:
        Remarks about samples with identical features, which are also added to the manifest's notes.
        The published extraction encodes a black image for every image that it cannot read.

    Raises:
        ValueError: naming the shard or the key that differs.
    """
    manifest = Manifest.load(folder)
    origins = _origins(plan)
    verify_shards(folder, manifest.shards)
    # One shard at a time: each holds its records in memory.
    for entry in manifest.shards:
        shard = Shard(entry_path(folder, entry), entry)
        share = math.ceil(rows * shard.samples / manifest.samples)
        for row in np.unique(np.linspace(0, shard.samples - 1, share).astype(int)):
            _compare(shard, int(row), plan.facts, *origins[shard.records[int(row)].key])
    identical = [
        f"{len(keys)} samples have identical features, as the published extraction gives images "
        f"that it could not read: {', '.join(keys[:_LISTED])}{' ...' * (len(keys) > _LISTED)}"
        for keys in _identical(manifest, folder)
    ]
    if identical:
        manifest.replace(notes={**manifest.notes, "identical_features": identical}).save(folder)
    return identical


def _origins(plan: ConversionPlan) -> dict[str, tuple[Source, int, SampleRecord]]:
    """Where the sample of each key comes from."""
    return {
        record.key: (source, row, record)
        for source, picked in zip(plan.sources, plan.samples, strict=True)
        for row, record in picked
    }


def _require_same_source(plan: ConversionPlan, folder: Path, entries: Sequence[ShardEntry]) -> None:
    """Raise ``ValueError`` for the first row of an earlier run that the source does not have."""
    origins = _origins(plan) if entries else {}
    for entry in entries:
        shard = Shard(entry_path(folder, entry), entry)
        for row in range(shard.samples):
            _compare(shard, row, plan.facts, *origins[shard.records[row].key])


def _identical(manifest: Manifest, folder: Path) -> list[list[str]]:
    """Keys of samples whose features are equal, group by group.

    First tokens are compared first; only samples that share theirs are read completely.
    """
    every = {i: range(entry.samples) for i, entry in enumerate(manifest.shards)}
    alike = _groups(manifest, folder, every, tokens=1)
    candidates: dict[int, list[int]] = defaultdict(list)
    for i, row, _ in sorted(place for group in alike for place in group):
        candidates[i].append(row)
    same = _groups(manifest, folder, candidates, tokens=manifest.tokens)
    return [[key for _, _, key in group] for group in same]


def _groups(
    manifest: Manifest, folder: Path, chosen: Mapping[int, Sequence[int]], tokens: int
) -> list[list[tuple[int, int, str]]]:
    """Groups of the chosen rows with the same first tokens, as (shard, row, key)."""
    groups: dict[bytes, list[tuple[int, int, str]]] = defaultdict(list)
    for i, rows in chosen.items():
        shard = Shard(entry_path(folder, manifest.shards[i]), manifest.shards[i])
        for row, fingerprint in zip(rows, shard.fingerprints(rows, tokens), strict=True):
            groups[fingerprint].append((i, row, shard.records[row].key))
    return [group for group in groups.values() if len(group) > 1]


def _compare(
    shard: Shard, row: int, facts: Manifest, source: Source, origin: int, record: SampleRecord
) -> None:
    stored = shard.read([row])
    expected = read_rows(facts, source, origin, origin + 1)
    same = {"record": shard.records[row] == record} | {
        name: x is None or torch.equal(y, x)
        for name, x, y in zip(TOWERS, expected, stored, strict=True)
    }
    for name, equal in same.items():
        if not equal:
            raise ValueError(
                f"{shard.path.name}: row {row}: {name} of {record.key!r} differs from row {origin} "
                f"of {source.name}; choose an empty folder for another source"
            )


def read_rows(
    facts: Manifest, source: Source, start: int, stop: int
) -> tuple[Tensor | None, Tensor | None]:
    """Rows ``start`` to ``stop`` of a source, in the tokens and the dtype that will be written."""

    def fitted(x: Tensor) -> Tensor:
        x = x.to(DTYPES[facts.dtype])
        if facts.tokens == source.tokens - 1:
            return x[:, 1:]
        if facts.tokens == source.tokens + 1:
            x = torch.cat((x[:, :1], x), dim=1)
            prepend_token_mean(x)
        return x

    towers = (source.eva, source.clip)
    eva, clip = (None if tower is None else fitted(tower.rows(start, stop)) for tower in towers)
    return eva, clip


def fp16_is_exact(plan: ConversionPlan) -> bool:
    """Whether fp16 represents some rows of every source exactly.

    The published extraction computes in fp16 and stores fp32, so half of its bytes are zeros.
    """
    for source in plan.sources:
        for tower in (source.eva, source.clip):
            if tower is not None:
                x = torch.cat([tower.rows(i, i + 1) for i in {0, tower.shape[0] - 1}])
                if not torch.equal(x.half().to(x.dtype), x):
                    return False
    return True


def _blocks(
    source: Source, picked: Sequence[tuple[int, SampleRecord]]
) -> Iterator[Sequence[tuple[int, SampleRecord]]]:
    """Runs of neighbouring rows, each at most ``_BLOCK_BYTES``."""
    row_bytes = sum(
        math.prod(x.shape[1:]) * x.torch_dtype.itemsize
        for x in (source.eva, source.clip)
        if x is not None
    )
    most = max(1, _BLOCK_BYTES // row_bytes)
    start = 0
    while start < len(picked):
        stop = start + 1
        while (
            stop < len(picked)
            and stop - start < most
            and picked[stop][0] == picked[stop - 1][0] + 1
        ):
            stop += 1
        yield picked[start:stop]
        start = stop


def _finite(
    source: Source,
    block: Sequence[tuple[int, SampleRecord]],
    towers: tuple[Tensor | None, Tensor | None],
    skipped: list[str],
    skip: bool,
) -> list[int]:
    """Positions in the block whose rows are finite; others raise an error, or are listed."""
    good: list[int] = []
    for i, (row, record) in enumerate(block):
        bad = [
            name
            for name, x in zip(TOWERS, towers, strict=True)
            if x is not None and not is_finite(bits(x[i].contiguous()), x.dtype)
        ]
        if not bad:
            good.append(i)
            continue
        where = f"{source.name}: row {row} (key {record.key!r})"
        if not skip:
            raise ValueError(
                f"{where}: {bad[0]} holds NaN or Inf, or values beyond the range of the dtype; "
                "choose another dtype or skip bad rows"
            )
        skipped.append(f"{where}: {bad[0]}")
    return good


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: expected {needed} bytes of free space, got {free}")
