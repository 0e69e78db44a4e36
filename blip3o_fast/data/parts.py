"""Parts of a data set that is being written, and the data set that they become."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip3o_fast.atomic import remove_leftovers
from blip3o_fast.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, entry_path
from blip3o_fast.data.sidecar import RecordFile


def part_path(folder: Path, part: str) -> Path:
    """Where a part lists its shards."""
    return folder / f"manifest.part-{part}.json"


def read_parts(folder: Path) -> dict[Path, Manifest]:
    """The manifest, if there is one, and then those of the parts; numbered parts by number."""
    parts = sorted(folder.glob(part_path(folder, "*").name), key=lambda p: (len(p.name), p.name))
    paths = [folder / MANIFEST_NAME, *parts]
    return {path: Manifest.read(path) for path in paths if path.is_file()}


def merge_parts(folder: str | Path, notes: Mapping[str, Any] | None = None) -> Manifest:
    """Make one data set of the parts that writers left in ``folder``.

    Args:
        folder: of the shards.
        notes: added to the manifest's; None adds those of the parts.

    Raises:
        ValueError: if the parts disagree about facts, share a key, or hold no samples at all.
    """
    folder = Path(folder)
    found = read_parts(folder)
    parts = [path for path in found if path.name != MANIFEST_NAME]
    if not any(manifest.shards for manifest in found.values()):
        for path in parts:
            path.unlink()
        raise ValueError(f"{folder}: no samples were written")
    first = next(iter(found.values()))
    shards: dict[str, ShardEntry] = {}
    merged_notes: dict[str, Any] = {}
    for path, manifest in found.items():
        first.require_facts(manifest, f"{path}:")
        if notes is None or path not in parts:
            merged_notes.update(manifest.notes)
        for entry in manifest.shards:
            if shards.setdefault(entry.file, entry) != entry:
                raise ValueError(f"{path}: {entry.file} differs from another part's")
    if len(parts) > 1:
        _require_distinct_keys(folder, shards.values())
    remove_leftovers(folder, MANIFEST_NAME)
    merged_notes.update(notes or {})
    merged = first.replace(shards=tuple(shards.values()), notes=merged_notes)
    merged.save(folder)
    for path in parts:
        path.unlink()
    return merged


def _require_distinct_keys(folder: Path, entries: Iterable[ShardEntry]) -> None:
    owners: dict[str, str] = {}
    for entry in entries:
        records = RecordFile(entry_path(folder, entry).with_suffix(".jsonl"), entry.samples)
        for row in range(len(records)):
            key = records[row].key
            if owners.setdefault(key, entry.file) != entry.file:
                raise ValueError(f"key {key!r} is in {owners[key]} and in {entry.file}")
