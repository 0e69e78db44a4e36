"""Files of the published implementation (github Hafeezmhk7/eva-clip-v2_4), read, not executed.

Training shards: a pickled dict with ``eva_blip3o_embeddings [n, T, 4096]``,
``clip_blip3o_embeddings [n, T, 1024]``, ``captions``, and perhaps ``keys`` and ``config``.
COCO files: ``eva_embeddings``, ``clip_embeddings`` and ``metadata``, a list of dicts.

T is 256, or 257 with the CLS token first. Embeddings are tensors, numpy arrays or lists, and may be
two-dimensional, ``[n * T, width]``. ``Source.remarks`` says what is odd about a file.
"""

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from blip3o_fast.data.conversion_sources import Source, StackedRows, TensorRows, TokenRows
from blip3o_fast.data.diskarray import DiskArray, read_pickle
from blip3o_fast.data.manifest import Encoder
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.untrusted import reading

TrainingMode = Literal["patch_only", "cls_patch"]

_TOKENS = (256, 257)
_MOST_LEVELS = 8  # of lists in lists
_ARCHIVES = {
    b"PK": "a zip archive, as torch.save and numpy.savez write; torch.save files hold no shards",
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"BZh": "a bzip2 file; unpack it first",
    b"\xfd7zX": "an xz file; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first",
}
_SHARD_KEYS = ("eva_blip3o_embeddings", "clip_blip3o_embeddings")
_COCO_KEYS = ("eva_embeddings", "clip_embeddings")
_LAYER = "last_hidden_state, before post_layernorm"
# The published extraction feeds both towers from CLIP's processor.
_PREPROCESSING = "CLIPImageProcessor of openai/clip-vit-large-patch14, 224 px"


def published_files(folder: Path, mode: TrainingMode | None = None) -> list[Path]:
    """The pickles of a folder that belong together, in the published order.

    For COCO, the consolidated file if there is one. For shards, those of one mode, whose names end
    in ``_patch_only`` or ``_cls_patch``; otherwise ``embeddings_shard_*``, otherwise all.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if shards of both modes are there and ``mode`` does not choose.
    """
    consolidated = folder / "coco_embeddings_consolidated.pkl"
    if consolidated.is_file():
        return [consolidated]
    coco = sorted(folder.glob("coco_embeddings_*.pkl"), key=_coco_order)
    if coco:
        return coco
    modes: tuple[TrainingMode, ...] = ("patch_only", "cls_patch")
    present = [m for m in modes if any(folder.glob(f"*_{m}.pkl"))]
    if mode is None and len(present) > 1:
        raise ValueError(f"{folder}: holds patch_only and cls_patch shards; choose a training_mode")
    chosen = mode or (present[0] if present else None)
    patterns = [f"embeddings_shard_*_{chosen}.pkl", f"*_{chosen}.pkl"] if chosen else []
    for pattern in [*patterns, "embeddings_shard_*.pkl", "*.pkl"]:
        other = {p for m in modes if m != chosen for p in folder.glob(f"*_{m}.pkl")}
        files = [path for path in folder.glob(pattern) if path not in other]
        if files:
            return sorted(files, key=_digits)
    raise FileNotFoundError(f"{folder}: expected published pickles (*.pkl), got none for {mode}")


def read_published(path: Path) -> Source:
    """A published training shard or COCO file.

    Raises:
        ValueError: if it is neither, is truncated, or holds anything but data.
    """
    with path.open("rb") as file:
        start = file.read(4)
    for magic, kind in _ARCHIVES.items():
        if start.startswith(magic):
            raise ValueError(f"{path.name}: expected a pickle, got {kind}")
    with reading(path, "a published pickle"):
        content = read_pickle(path)
        if isinstance(content, dict):
            if any(key in content for key in _SHARD_KEYS):
                return _shard(path, content)
            if any(key in content for key in _COCO_KEYS):
                return _coco(path, content)
    raise ValueError(
        f"{path.name}: expected a published shard ({', '.join(_SHARD_KEYS)}) or COCO file "
        f"({', '.join(_COCO_KEYS)}), got {reprlib.repr(content)}"
    )


def _shard(path: Path, content: dict[Any, Any]) -> Source:
    _require(path, content, (*_SHARD_KEYS, "captions"))
    remarks: list[str] = []
    captions = _sequence(path, "captions", content["captions"])
    eva, clip = (_rows(path, key, content[key], len(captions)) for key in _SHARD_KEYS)
    samples = eva.shape[0]
    keys = _sequence(path, "keys", content.get("keys") or [])
    if len(keys) not in (0, samples):
        remarks.append(f"{len(keys)} keys for {samples} samples; samples are numbered instead")
        keys = []
    if len(captions) != samples:
        remarks.append(f"{len(captions)} captions for {samples} samples; the rest is cut or empty")
    records = [
        SampleRecord(
            (_text(path, "keys", keys[i]) if keys else "") or _unnamed(path, i),
            _text(path, "captions", captions[i]) if i < len(captions) else "",
        )
        for i in range(samples)
    ]
    return _source(path, content, records, eva, clip, remarks)


def _coco(path: Path, content: dict[Any, Any]) -> Source:
    _require(path, content, (*_COCO_KEYS, "metadata"))
    remarks: list[str] = []
    metadata = _sequence(path, "metadata", content["metadata"])
    distinct = _distinct(metadata)
    eva, clip = (_rows(path, key, content[key], len(distinct)) for key in _COCO_KEYS)
    samples = eva.shape[0]
    # Repeated entries are dropped only if the full list does not fit: a consolidated file can
    # repeat (batch, sample) pairs in its metadata and in its embeddings.
    if len(metadata) != samples and len(distinct) < len(metadata):
        remarks.append(
            f"metadata repeats itself: {len(metadata)} entries, {len(distinct)} distinct"
        )
        metadata = distinct
    if len(metadata) != samples:
        remarks.append(
            f"{len(metadata)} metadata for {samples} samples; the rest is cut or unnamed"
        )
    records = [
        _coco_record(path, metadata[i], i) if i < len(metadata) else SampleRecord(_unnamed(path, i))
        for i in range(samples)
    ]
    return _source(path, content, records, eva, clip, remarks, same_key_same_image=True)


def _coco_record(path: Path, entry: Any, index: int) -> SampleRecord:
    if not isinstance(entry, dict):
        return SampleRecord(_unnamed(path, index), _text(path, "metadata", entry))
    image = entry.get("image_id")
    key = _unnamed(path, index) if image is None else f"coco_{_text(path, 'image_id', image)}"
    caption = _text(path, "caption", entry.get("caption"))
    return SampleRecord(key, caption, _text(path, "file_name", entry.get("file_name")))


def _unnamed(path: Path, index: int) -> str:
    return f"{path.stem}_sample_{index:05d}"


def _distinct(metadata: Sequence[Any]) -> Sequence[Any]:
    """The first entry of each (batch_idx, sample_idx); all entries where one lacks the pair."""
    seen: dict[Any, Any] = {}
    for entry in metadata:
        pair = (entry.get("batch_idx"), entry.get("sample_idx")) if isinstance(entry, dict) else ()
        if not pair or any(type(number) is not int for number in pair):
            return metadata
        # As text, whose hash nobody can choose.
        seen.setdefault(str(pair), entry)
    return list(seen.values())


def _source(
    path: Path,
    content: dict[Any, Any],
    records: list[SampleRecord],
    eva: TokenRows,
    clip: TokenRows,
    remarks: list[str],
    *,
    same_key_same_image: bool = False,
) -> Source:
    config = content.get("config")
    config = config if isinstance(config, dict) else {}
    include_cls = config.get("include_cls")
    by_count = eva.shape[1] == _TOKENS[1] if eva.shape[1] in _TOKENS else None
    if isinstance(include_cls, bool) and by_count is not None and include_cls != by_count:
        remarks.append(
            f"config says include_cls={include_cls}, the tensors have {eva.shape[1]} tokens"
        )
    has_cls = include_cls if isinstance(include_cls, bool) and by_count is None else by_count
    return Source(
        name=path.name,
        records=records,
        eva=eva,
        clip=clip,
        has_cls=has_cls,
        eva_encoder=_encoder(config.get("eva_model"), "BAAI/EVA-CLIP-8B"),
        clip_encoder=_encoder(config.get("clip_model"), "openai/clip-vit-large-patch14"),
        same_key_same_image=same_key_same_image,
        remarks=tuple(remarks),
    )


def _encoder(name: Any, published: str) -> Encoder:
    return Encoder(name if isinstance(name, str) else published, "", _LAYER, _PREPROCESSING)


def _rows(path: Path, key: str, value: Any, samples: int) -> TokenRows:
    """Embeddings of any published kind; two-dimensional ones are cut into ``samples``."""
    where = f"{path.name}: {key}"
    if isinstance(value, DiskArray):
        if len(value.shape) == 2:
            value = value.grouped(_samples(where, value.shape[0], samples))
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: expected embeddings, got {reprlib.repr(value)}")
    if all(isinstance(item, DiskArray) for item in value):
        rows = StackedRows(value)
        _require_room(path, where, math.prod(rows.shape) * rows.torch_dtype.itemsize)
        return rows
    _require_room(path, where, _numbers(value))
    try:
        return TensorRows(torch.tensor(value, dtype=torch.float32, device="cpu"))
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected nested lists of numbers: {error}") from error


def _numbers(value: Any) -> int:
    """Numbers in nested lists, by the length of the first of each level."""
    count = 1
    for _ in range(_MOST_LEVELS):  # a list can hold itself
        if isinstance(value, (list, tuple)) and value:
            count *= len(value)
            value = value[0]
    return count


def _require_room(path: Path, where: str, needed: int) -> None:
    """Lists of a pickle can share their parts, and so claim more than the file could hold."""
    if needed > path.stat().st_size:
        raise ValueError(f"{where}: refused: {needed} bytes or more of a file that is smaller")


def _samples(where: str, rows: int, samples: int) -> int:
    """How many samples the rows of a two-dimensional array are."""
    fits = samples > 0 and rows % samples == 0
    counts = [rows // tokens for tokens in _TOKENS if rows % tokens == 0]
    if fits and (samples in counts or not counts):
        return samples
    if len(counts) == 1:
        return counts[0]
    raise ValueError(f"{where}: {rows} rows of tokens do not fit {samples} samples of 256 or 257")


def _require(path: Path, content: dict[Any, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path.name}: expected keys {', '.join(keys)}, missing {missing[0]!r}")


def _sequence(path: Path, key: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path.name}: {key}: expected a list, got {reprlib.repr(value)}")
    return value


def _text(path: Path, key: str, value: Any) -> str:
    if value is None or isinstance(value, (str, int, float)):
        return "" if value is None else str(value)
    raise ValueError(f"{path.name}: {key}: expected text, got {reprlib.repr(value)}")


def _digits(path: Path) -> tuple[int, str]:
    """Published order: the integer made of all digits in the name."""
    return int("".join(c for c in path.stem if c.isascii() and c.isdigit()) or 0), path.name


def _coco_order(path: Path) -> tuple[bool, int, str]:
    """Numbered batches first, then other files, such as the final one."""
    return "batch" not in path.stem, *_digits(path)
