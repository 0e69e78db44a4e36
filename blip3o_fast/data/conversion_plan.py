"""The plan of a conversion: what is there, what will be written, and under which keys.

Only headers are read, so planning a conversion of terabytes takes seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from blip3o_fast.data.conversion_sources import Source, npy_source
from blip3o_fast.data.legacy import TrainingMode, published_files, read_published
from blip3o_fast.data.manifest import Encoder, Manifest, Split
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.data.tars import tar_source
from blip3o_fast.devices import DTYPES
from blip3o_fast.words import DtypeName


@dataclass(frozen=True)
class Wishes:
    """What the user asks of a conversion; None follows the source.

    Attributes:
        dtype: ``bf16``, ``fp16`` or ``fp32``; None keeps the source's (fp32 for fp64).
        tokens: 256 from 257 drops the CLS token, 257 from 256 puts the token mean in its place.
        grid: (depth, height, width) of the patches; None assumes a square.
        heldout_fraction: share of the photos to hold out of training.
        eva_encoder, clip_encoder: names of the towers, if the source does not say.
    """

    dtype: DtypeName | None = None
    tokens: int | None = None
    grid: tuple[int, int, int] | None = None
    heldout_fraction: float = 0.1
    eva_encoder: str | None = None
    clip_encoder: str | None = None


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Attributes:
        sources: in order.
        facts: the manifest, still without shards.
        samples: for each source, the rows to write and their records.
        remarks: what is odd about the sources, one line each.
    """

    sources: tuple[Source, ...]
    facts: Manifest
    samples: tuple[tuple[tuple[int, SampleRecord], ...], ...]
    remarks: tuple[str, ...]

    @property
    def count(self) -> int:
        """Samples to write."""
        return sum(map(len, self.samples))


def open_sources(
    path: Path, mode: TrainingMode | None = None, max_shards: int | None = None
) -> list[Source]:
    """The sources at ``path``: a pickle, a tar, or a folder of pickles, of tars or of .npy files.

    Raises:
        FileNotFoundError: if there is nothing to convert.
        ValueError: naming the file that cannot be read.
    """
    if path.is_file():
        return [tar_source(path) if path.suffix == ".tar" else read_published(path)]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "eva.npy").is_file() or (path / "clip.npy").is_file():
        return [npy_source(path)]
    tars = sorted(path.glob("*.tar"))
    if tars:
        return [tar_source(tar) for tar in tars[:max_shards]]
    return [read_published(file) for file in published_files(path, mode)[:max_shards]]


def plan_conversion(sources: Sequence[Source], wishes: Wishes) -> ConversionPlan:
    """Decide what will be written, and under which keys.

    Raises:
        ValueError: naming the source, if the sources differ in towers, widths or tokens.
    """
    first = sources[0]
    eva_width, clip_width = _widths(first)
    for source in sources:
        if _widths(source) != (eva_width, clip_width):
            raise ValueError(
                f"{source.name}: expected widths (eva, clip) {_widths(first)} as in {first.name}, "
                f"got {_widths(source)}"
            )
    remarks = [f"{source.name}: {remark}" for source in sources for remark in source.remarks]
    layouts = {(source.tokens, _has_cls(source, wishes)) for source in sources}
    if len(layouts) > 1 and wishes.tokens is None:
        raise ValueError(
            f"{first.name}: the sources differ in (tokens, CLS): {sorted(layouts)}; choose tokens"
        )
    tokens = wishes.tokens or first.tokens
    stand_ins = [s for s in sources if _fit(s, tokens, _has_cls(s, wishes)) == "token_mean"]
    has_cls = bool(stand_ins) or any(n == tokens and cls for n, cls in layouts)
    notes: dict[str, Any] = {
        "converted_from": [source.name for source in sources],
        "remarks": remarks,
    }
    if stand_ins:
        notes["cls"] = "token_mean"
        remarks.append(f"{len(stand_ins)} sources without CLS: token 0 is the mean of the others")
    facts = Manifest(
        tokens=tokens,
        has_cls=has_cls,
        grid=wishes.grid or _square(tokens - has_cls),
        eva_width=eva_width,
        clip_width=clip_width,
        dtype=wishes.dtype or _dtype(sources),
        eva_encoder=_encoder(first.eva_encoder, wishes.eva_encoder) if eva_width else None,
        clip_encoder=_encoder(first.clip_encoder, wishes.clip_encoder) if clip_width else None,
        split=Split(wishes.heldout_fraction),
        notes=notes,
    )
    samples = _name_samples(sources, remarks)
    return ConversionPlan(tuple(sources), facts, samples, tuple(remarks))


def _widths(source: Source) -> tuple[int, int]:
    eva, clip = (0 if x is None else x.shape[2] for x in (source.eva, source.clip))
    return eva, clip


def _has_cls(source: Source, wishes: Wishes) -> bool:
    """What the source says; if it does not, whether the tokens are a grid and one more."""
    if source.has_cls is not None:
        return source.has_cls
    if wishes.grid is not None:
        return source.tokens == math.prod(wishes.grid) + 1
    return math.isqrt(source.tokens) ** 2 != source.tokens and (
        math.isqrt(source.tokens - 1) ** 2 == source.tokens - 1
    )


def _fit(source: Source, tokens: int, has_cls: bool) -> str:
    """How a source's tokens become ``tokens``."""
    if tokens == source.tokens:
        return "as stored"
    if tokens == source.tokens - 1 and has_cls:
        return "drop"
    if tokens == source.tokens + 1 and not has_cls:
        return "token_mean"
    raise ValueError(
        f"{source.name}: tokens: expected {source.tokens} or "
        f"{source.tokens + (-1 if has_cls else 1)}, got {tokens}"
    )


def _square(patches: int) -> tuple[int, int, int]:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"grid: {patches} patches are no square; give depth, height and width")
    return (1, side, side)


def _dtype(sources: Sequence[Source]) -> DtypeName:
    """The narrowest of our types that holds what every source holds; fp32 for fp64."""
    found = set().union(*(source.dtypes for source in sources))
    names = [name for name in get_args(DtypeName) if found == {DTYPES[name]}]
    return names[0] if names else "fp32"


def _encoder(known: Encoder | None, wish: str | None) -> Encoder:
    return Encoder(wish or "") if known is None or wish else known


def _name_samples(
    sources: Sequence[Source], remarks: list[str]
) -> tuple[tuple[tuple[int, SampleRecord], ...], ...]:
    """Rows to write, with keys that are unique over all sources."""
    seen: set[str] = set()
    picked: list[tuple[tuple[int, SampleRecord], ...]] = []
    for source in sources:
        rows: list[tuple[int, SampleRecord]] = []
        repeated = 0
        for row, record in enumerate(source.records):
            if record.key in seen:
                repeated += 1
                if source.same_key_same_image:
                    continue
                # The photo keeps the old key, so that equal images stay on one side of the split.
                name = f"{record.key}@{Path(source.name).stem}"
                name = f"{name}#{row}" if name in seen else name
                record = SampleRecord(name, record.caption, record.photo)
            seen.add(record.key)
            rows.append((row, record))
        if repeated:
            done = "left out" if source.same_key_same_image else "renamed KEY@FILE"
            remarks.append(f"{source.name}: {repeated} keys occurred before; {done}")
        picked.append(tuple(rows))
    return tuple(picked)
