"""The folders of a run: written whole, found again after any crash, deleted only when superseded.

    run/
      options.json                      what the run is
      metrics.jsonl                     one line per step and per validation
      step_500/                         a checkpoint
        config.json, model.safetensors  the model, as ``BLIP3oDiT.from_pretrained`` reads it
        trainer.pt                      everything else that an exact resume needs
        sharded/                        FSDP: weights, moments and averages, a shard per process
        COMPLETE                        sizes and SHA-256 of the files above, written last
      latest, best                      names of checkpoints

A checkpoint is written in a hidden folder, flushed to the disk, and renamed. If this is
interrupted, earlier checkpoints stay as they were.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from blip3o_fast.atomic import file_sha256, sync_folder, write_atomically, write_json
from blip3o_fast.checked import read_json
from blip3o_fast.checkpoint import MARKER
from blip3o_fast.processes import World

PENDING_SUFFIX = ".partial"
LATEST, BEST = "latest", "best"


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step}"


def step_of(folder: Path) -> int:
    """The inverse of ``checkpoint_name``; -1 for any other name."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else -1


def complete_checkpoints(run: Path) -> list[Path]:
    """The usable checkpoints of a run, newest first."""
    folders = [path for path in run.glob("step_*") if step_of(path) >= 0 and is_complete(path)]
    return sorted(folders, key=step_of, reverse=True)


def is_complete(folder: Path) -> bool:
    """Whether every file that the marker lists is there in full; ``require_intact`` reads them."""
    try:
        sizes = read_json(folder / MARKER)["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None], world: World) -> Path:
    """Make ``step_N`` by ``write(folder)``, which every process calls; return its path.

    A complete checkpoint of that step is left as it is.

    Raises:
        OSError: if anything could not be written; no trace of the attempt is left.
    """
    final = run / checkpoint_name(step)
    if world.minimum(int(is_complete(final))):
        return final
    pending = run / f".{final.name}{PENDING_SUFFIX}"
    failure: Exception | None = None
    try:
        if world.is_main:
            shutil.rmtree(pending, ignore_errors=True)
            pending.mkdir()  # a run whose folder was deleted is over
        world.barrier()
        write(pending)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        failure = error
    failed_elsewhere = world.agree(failure is not None)
    if world.is_main and not failed_elsewhere:
        try:
            _settle(pending, final, step)
        except OSError as error:
            failure = error
    if world.agree(failure is not None):
        if world.is_main:
            shutil.rmtree(pending, ignore_errors=True)
        reason = " ".join(str(failure or "another process failed").split())
        raise OSError(
            f"cannot write {final}: {reason}; the checkpoints before it are as they were"
        ) from failure
    return final


def _settle(pending: Path, final: Path, step: int) -> None:
    """Mark a written folder as complete and give it its name."""
    paths = [path for path in sorted(pending.rglob("*")) if path.is_file()]
    names = [path.relative_to(pending).as_posix() for path in paths]
    for folder in {path.parent for path in pending.rglob("*")}:
        sync_folder(folder)
    marker = {
        "format_version": 1,
        "step": step,
        "files": {name: path.stat().st_size for name, path in zip(names, paths, strict=True)},
        "sha256": {name: file_sha256(path) for name, path in zip(names, paths, strict=True)},
    }
    write_json(pending / MARKER, marker)
    if final.exists():  # incomplete: a complete one would have been kept
        shutil.rmtree(final)
    pending.rename(final)
    sync_folder(final.parent)


def point(run: Path, pointer: str, folder: Path) -> None:
    """Make a pointer file name a checkpoint, atomically."""
    path = run / pointer
    if not path.is_file() or path.read_text(encoding="utf-8").strip() != folder.name:
        write_atomically(path, f"{folder.name}\n".encode())


def pointed(run: Path, pointer: str) -> Path | None:
    """The complete checkpoint that a pointer names, if there is one."""
    try:
        name = (run / pointer).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    folder = run / name
    return folder if step_of(folder) >= 0 and is_complete(folder) else None


def delete_superseded(run: Path, keep_last: int, keep: Iterable[Path | None]) -> None:
    """Delete complete checkpoints beyond the newest ``keep_last``, but those in ``keep``."""
    kept = {path.name for path in keep if path is not None}
    for folder in complete_checkpoints(run)[keep_last:]:
        if folder.name not in kept:
            # Without its marker, a folder that is only partly deleted does not count as complete.
            (folder / MARKER).unlink()
            shutil.rmtree(folder)


def delete_unfinished(run: Path) -> None:
    """Delete what interrupted writes and deletions left: hidden folders, and those not marked."""
    unmarked = [path for path in run.glob("step_*") if not (path / MARKER).exists()]
    leftovers = [path for path in unmarked if step_of(path) >= 0]
    for folder in [*run.glob(f".step_*{PENDING_SUFFIX}"), *leftovers]:
        shutil.rmtree(folder)


def damaged_checkpoints(run: Path) -> list[str]:
    """Names of checkpoints that were complete once and have lost files or bytes since."""
    marked = [path for path in run.glob("step_*") if (path / MARKER).exists()]
    return sorted(path.name for path in marked if step_of(path) >= 0 and not is_complete(path))
