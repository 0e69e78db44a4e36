"""Shards are read once a run to compare them with the manifest, not once a start.

A run's folder remembers the size and the times of change of every file that was verified. When the
run is started again, only files that differ from what is remembered are read.
"""

from collections.abc import Sequence
from pathlib import Path

from blip3o_fast.atomic import write_json
from blip3o_fast.checked import read_json
from blip3o_fast.data.manifest import ShardEntry
from blip3o_fast.data.reader import verify_shards
from blip3o_fast.processes import World
from blip3o_fast.untrusted import reading

VERIFIED_NAME = "verified.json"


def verify_once(folder: Path, entries: Sequence[ShardEntry], run: Path, world: World) -> None:
    """Verify those shards that this run has not seen as they are; processes share the work.

    Args:
        folder: of the shards.
        entries: of their manifest.
        run: folder that remembers.
        world: every process calls it.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming a file that is not what the manifest lists.
    """
    memory = run / VERIFIED_NAME
    seen: dict[str, object] = {}
    if memory.is_file():
        with reading(memory, "what was verified; delete it to verify again"):
            seen = dict(read_json(memory))
    now = {str(folder.resolve() / entry.file): _stamps(folder / entry.file) for entry in entries}
    changed = [
        entry
        for entry, (name, stamps) in zip(entries, now.items(), strict=True)
        if seen.get(name) != stamps
    ]
    verify_shards(folder, changed[world.rank :: world.size])
    world.barrier()
    if world.is_main and changed:
        write_json(memory, now)


def _stamps(path: Path) -> list[int]:
    files = (path.stat(), path.with_suffix(".jsonl").stat())
    return [x for s in files for x in (s.st_size, s.st_mtime_ns, s.st_ctime_ns)]
