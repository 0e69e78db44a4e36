"""The manifest: what a folder of embedding shards holds, and where each fact comes from.

A folder holds ``manifest.json`` and, per shard, a safetensors file and a JSONL sidecar::

    manifest.json
    shard_00000.safetensors     eva [n, T, E] and clip [n, T, C]; a tower that is absent has width 0
    shard_00000.jsonl           n lines {"key": ..., "caption": ..., "source": ...}

The manifest is written last, so a folder without one is not a data set yet. A manifest is not
trusted: its entries must stay inside the folder, and its counts must agree.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blip3o_fast.atomic import write_json
from blip3o_fast.checked import Count, Share, check, check_names, from_json, json_object, read_json
from blip3o_fast.devices import DTYPES
from blip3o_fast.untrusted import reading
from blip3o_fast.words import DtypeName

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_LARGEST_MANIFEST = 1 << 28  # bytes, checked before the file is read; enough for 900,000 shards


@dataclass(frozen=True)
class Encoder:
    """Where one tower's embeddings come from; empty strings mean unknown.

    Attributes:
        name: model, as in ``openai/clip-vit-large-patch14``.
        revision: commit or version of its weights.
        layer: which hidden state, and before or after which norm.
        preprocessing: image size, resampling, normalisation.
    """

    name: str
    revision: str = ""
    layer: str = ""
    preprocessing: str = ""


@dataclass(frozen=True)
class ShardEntry:
    """One shard of the manifest.

    Attributes:
        file: name of the safetensors file, relative to the folder, with forward slashes.
        samples: rows n, at least 1.
        bytes: size of the safetensors file.
        sha256: of the safetensors file, 64 hexadecimal digits.
        records_sha256: of the sidecar, which has the same name with the suffix ``.jsonl``.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    records_sha256: str


@dataclass(frozen=True)
class Split:
    """Which source photos are held out of training.

    Attributes:
        heldout_fraction: expected share of the sources, chosen by a hash of each; 0 holds out none.
        heldout_sources: the held-out sources by name; when given, the fraction is not used.
    """

    heldout_fraction: Share = 0.1
    heldout_sources: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check(self, "split")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Facts about a folder of shards.

    Attributes:
        format_version: version of this layout; 1.
        tokens: tokens T of a sample, CLS included.
        has_cls: whether token 0 is a CLS token.
        grid: (depth, height, width) of the patches, in row-major order.
        eva_width: width E; 0 when the folder holds no EVA embeddings.
        clip_width: width C; 0 when the folder holds no CLIP embeddings.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        eva_encoder, clip_encoder: origin of each tower; None when it is absent.
        shards: in the order that numbers the samples.
        split: what is held out of training.
        notes: anything else worth keeping, as JSON values.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    tokens: int
    has_cls: bool
    grid: tuple[Count, Count, Count]
    eva_width: int
    clip_width: int
    dtype: DtypeName
    eva_encoder: Encoder | None = None
    clip_encoder: Encoder | None = None
    shards: tuple[ShardEntry, ...] = ()
    split: Split = field(default_factory=Split)
    notes: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: this library reads {FORMAT_VERSION}, got {self.format_version!r}"
            )
        check(self, "manifest")
        if self.tokens != math.prod(self.grid) + self.has_cls:
            raise ValueError(
                f"tokens: expected {math.prod(self.grid) + self.has_cls} for grid {self.grid} "
                f"{'with' if self.has_cls else 'without'} CLS, got {self.tokens}"
            )
        if min(self.eva_width, self.clip_width) < 0 or self.eva_width + self.clip_width == 0:
            raise ValueError(
                "eva_width, clip_width: expected 0 for an absent tower and at least one present, "
                f"got {self.eva_width} and {self.clip_width}"
            )
        self._check_entries()

    @property
    def samples(self) -> int:
        """Samples of all shards together."""
        return sum(entry.samples for entry in self.shards)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's embeddings, both towers."""
        return self.tokens * (self.eva_width + self.clip_width) * DTYPES[self.dtype].itemsize

    def facts(self) -> dict[str, Any]:
        """The fields that every part of one data set must share."""
        names = (
            *("tokens", "has_cls", "grid", "eva_width", "clip_width", "dtype"),
            *("eva_encoder", "clip_encoder", "split"),
        )
        return {name: getattr(self, name) for name in names}

    def require_facts(self, other: "Manifest", where: str, remedy: str = "") -> None:
        """Raise ``ValueError``, naming the fields, unless ``other`` shares every fact."""
        mine, theirs = _named(self.facts()), _named(other.facts())
        differing = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        if differing:
            raise ValueError(
                f"{where} differs in "
                + "; ".join(f"{n}: expected {mine.get(n)}, got {theirs.get(n)}" for n in differing)
                + remedy
            )

    def digest(self) -> str:
        """SHA-256 that names the samples and their split: by the shards' own digests."""
        entries = [(entry.sha256, entry.records_sha256) for entry in self.shards]
        content = json.dumps([entries, asdict(self.split)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def replace(self, **changes: Any) -> "Manifest":
        """A copy with some fields changed."""
        check_names(Manifest, changes, "manifest key")
        return replace(self, **changes)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read ``folder/manifest.json``.

        Raises:
            FileNotFoundError: if there is none: the folder is no data set, or is unfinished.
            ValueError: if it is malformed, of another version, contradicts itself, names an unknown
                key, points outside the folder or lists no samples.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no manifest; {_absence(path.parent)}")
        manifest = cls.read(path)
        if not manifest.shards:
            raise ValueError(f"{path}: expected at least one shard, got none")
        for entry in manifest.shards:
            entry_path(path.parent, entry)
        return manifest

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/manifest.json``, whole or not at all, and return its path."""
        return self.write(Path(folder) / MANIFEST_NAME)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read one manifest file, finished or not; errors name the file."""
        with reading(path, "a manifest"):
            return cls.from_dict(read_json(path, _LARGEST_MANIFEST))

    def write(self, path: Path) -> Path:
        """Write one manifest file, whole or not at all."""
        write_json(path, self.to_dict())
        return path

    @classmethod
    def from_dict(cls, values: Any) -> "Manifest":
        """Build from parsed JSON; the inverse of ``to_dict``."""
        values = json_object("manifest", values)
        samples = values.pop("samples", None)
        if values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            # Unknown keys are errors in our version only; the version is refused below.
            values = {name: values[name] for name in values if name in cls.__dataclass_fields__}
        manifest = from_json(cls, values, "manifest")
        if samples != manifest.samples:
            raise ValueError(
                f"samples: expected {manifest.samples}, the sum over the shards, got {samples!r}"
            )
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, and ``samples``, their sum over the shards."""
        return {"format_version": self.format_version, "samples": self.samples, **asdict(self)}

    def _check_entries(self) -> None:
        seen: set[str] = set()
        for entry in self.shards:
            check(entry, f"shard {entry.file!r}")
            if entry.file in seen:
                raise ValueError(f"shards: {entry.file!r} is listed twice")
            seen.add(entry.file)
            if entry.samples < 1:
                raise ValueError(f"shard {entry.file!r}: expected samples, got {entry.samples}")
            if entry.bytes <= entry.samples * self.sample_bytes:
                raise ValueError(
                    f"shard {entry.file!r}: {entry.samples} samples need more than "
                    f"{entry.samples * self.sample_bytes} bytes, the entry says {entry.bytes}"
                )
            for digest in (entry.sha256, entry.records_sha256):
                if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
                    raise ValueError(
                        f"shard {entry.file!r}: expected 64 hexadecimal digits, got {digest!r}"
                    )


def entry_path(folder: Path, entry: ShardEntry) -> Path:
    """Where a shard lies, which is always inside ``folder``.

    Raises:
        ValueError: if the entry is absolute, climbs out with ``..``, or is a link that leads out.
    """
    name = entry.file
    parts = name.split("/")
    plain = name.endswith(".safetensors") and not set(name) & {"\\", ":", "\0"}
    if not plain or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"shard {name!r}: expected a .safetensors file name relative to {folder}, without '..'"
        )
    path = folder / name
    for file in (path, path.with_suffix(".jsonl")):
        # Only links can lead elsewhere. Resolving 100,000 paths would take seconds.
        steps = (file, *file.parents[: len(parts) - 1])
        linked = any(step.is_symlink() for step in steps)
        if linked and not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"shard {name!r}: {file.name} is a link that leads out of {folder}")
    return path


def _named(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with each field of an encoder by its own name."""
    named: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Encoder):
            named |= {f"{name}.{field}": text for field, text in asdict(value).items()}
        else:
            named[name] = value
    return named


def _absence(folder: Path) -> str:
    """What a folder without a manifest is, and what to do about it."""
    if not folder.is_dir():
        return "the folder does not exist"
    if any(folder.glob("manifest.part-*.json")):
        return "the data set is unfinished; run the command that was writing it again"
    if any(folder.glob("*.pkl")):
        return f"published pickles are converted once: blip3o-fast convert {folder} DEST"
    return "expected a folder written by 'blip3o-fast extract' or 'blip3o-fast convert'"
