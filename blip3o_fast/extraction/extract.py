"""Images to paired shards, by one process or by several that share the work.

Images are cut into lots (see ``lots``). A lot is encoded by one process, which writes its shards
and then ``manifest.part-lotNNNNN.json``; when all lots are done, the parts become the manifest. So
the data set is the same bit for bit, whoever encodes a lot and when, on devices that compute alike.

A sample's key names its image and crop, so an interrupted extraction skips the keys that finished
shards hold; the digests beside the keys show whether they were made from the same images and
captions. Images that cannot be read are listed in ``skipped.jsonl``, one ``{"key": ..., "reason":
...}`` per line, and tried again by the next run.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from blip3o_fast.atomic import locked, remove_leftovers, write_atomically
from blip3o_fast.claims import CLAIMS_FILE, Claims
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.parts import merge_parts, part_path, read_parts
from blip3o_fast.data.shards import ShardWriter
from blip3o_fast.errors import OptionError
from blip3o_fast.extraction.encoders import TowerPair
from blip3o_fast.extraction.images import pillow
from blip3o_fast.extraction.lots import Images, Lot, Lots, Skipped
from blip3o_fast.extraction.pipeline import Known, encode_lots
from blip3o_fast.extraction.views import ExtractionSettings, open_view
from blip3o_fast.progress import Progress

__all__ = [
    "Extracted",
    "ExtractionSettings",
    "Skipped",
    "Stopped",
    "extract",
    "extract_share",
    "open_view",
]

SKIPPED_FILE = "skipped.jsonl"
DEFAULTS = ExtractionSettings()


class Extracted(NamedTuple):
    """A finished extraction: samples in the folder, those of this call, and skipped images."""

    samples: int
    added: int
    skipped: tuple[Skipped, ...]


class Stopped(Exception):
    """The extraction was asked to stop; the shards so far are complete and can be resumed."""


def extract(
    images: Images,
    towers: TowerPair,
    folder: str | Path,
    settings: ExtractionSettings = DEFAULTS,
    *,
    resume: bool = False,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Extracted:
    """Encode images by both towers and write the pairs as shards.

    Args:
        images: images, all of which are held in memory, or tars, which are not; in an order that
            does not change between runs.
        towers: the pair.
        folder: of the shards; created if need be.
        settings: see ``ExtractionSettings``.
        resume: continue a folder that holds shards of the same towers and layout.
        progress: show a bar of samples.
        stop: asked after every batch; when true, the shard in progress is finished and ``Stopped``
            raised.

    Raises:
        OptionError: if another process writes to the folder.
        ValueError: on settings that do not fit the towers, a folder of other shards, features that
            are not finite (naming the sample), or when there is nothing to write.
        ImportError: without Pillow, naming the extra.
        Stopped: when ``stop`` said so.
    """
    pillow()
    facts, folder, lots = _facts(towers, settings), Path(folder), Lots(images, settings)
    with locked(folder):
        run = _Run(lots, towers, folder, settings, facts, None, resume=resume)
        # Nobody else is here: whoever wrote these was killed.
        remove_leftovers(folder, "*")
        with Progress("extract", lots.samples, enabled=progress) as bar:
            run.work(bar.update, stop)
        (folder / CLAIMS_FILE).unlink(missing_ok=True)
        return run.finish()


def extract_share(
    images: Images,
    towers: TowerPair,
    folder: str | Path,
    settings: ExtractionSettings = DEFAULTS,
    *,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Extracted | None:
    """Encode a share of the images, beside other processes that were called with the same.

    Processes may come and go at any time; each takes the next lot that nobody has. One that dies
    keeps no lot from the others. The last one to leave finishes the data set.

    Args:
        images, towers, folder, settings: see ``extract``; the same for all, on one file system that
            has locks (``blip3o_fast.claims``). A folder that holds shards is continued.
        progress: show a bar of this process's samples.
        stop: asked after every batch; when true, the shard in progress is dropped, so that the
            data set does not depend on when that was, and ``Stopped`` raised.

    Returns:
        The finished extraction, with what this process added; None if others are still at work.

    Raises:
        OptionError: if others are at work there with other images or settings, if ``max_samples``
            is given, which only one process can count, or if the file system has no locks.
        ValueError, ImportError, Stopped: see ``extract``.
    """
    pillow()
    if settings.max_samples is not None:
        raise OptionError("max_samples: expected a single process, got several")
    facts, folder, lots = _facts(towers, settings), Path(folder), Lots(images, settings)
    with (
        locked(folder, shared=True),
        Claims(folder, lots.digest()) as claims,
        Progress("extract", enabled=progress) as bar,
    ):
        run = _Run(lots, towers, folder, settings, facts, claims, resume=True)
        while True:
            run.work(bar.update, stop)
            if not claims.is_last():
                return None
            if run.is_complete():
                try:
                    return run.finish()
                finally:
                    claims.remove()
            claims.go_on()


class _Run:
    """One process's part in an extraction, with or without others."""

    def __init__(
        self,
        lots: Lots,
        towers: TowerPair,
        folder: Path,
        settings: ExtractionSettings,
        facts: Manifest,
        claims: Claims | None,
        *,
        resume: bool,
    ) -> None:
        self.lots, self.towers, self.folder, self.settings = lots, towers, folder, settings
        self.claims = claims
        self.name = secrets.token_hex() if claims is None else claims.run
        self.added = 0
        self.writer = ShardWriter(
            folder,
            facts=facts,
            samples_per_shard=settings.samples_per_shard,
            resume=resume,
            part=None,
            merge=False,
        )

    def work(self, seen: Callable[[int], object], stop: Callable[[], bool]) -> None:
        """Encode and write whatever nobody else has.

        Raises:
            Stopped: when ``stop`` said so.
        """
        writer, limit, current = self.writer, self.settings.max_samples, None
        if limit is not None:
            limit = max(0, limit - len(writer.done))
        known = Known(writer.done, writer.digests)
        batches = encode_lots(
            self._mine(), self.towers, self.settings, known, limit=limit, seen=seen
        )
        try:
            with contextlib.closing(batches):
                for batch in batches:
                    if batch.lot is not current:
                        current = batch.lot
                        writer.begin(current.part)
                    if batch.records:
                        writer.add(batch.eva, batch.clip, batch.records)
                        self.added += len(batch.records)
                    if batch.is_last:
                        self._end(batch.lot)
                    if batch.records and stop():
                        (writer.flush if self.claims is None else writer.discard)()
                        raise Stopped(f"stopped with {len(writer.done)} samples in {self.folder}")
        finally:
            writer.discard()

    def is_complete(self) -> bool:
        """Whether this run has been through every lot."""
        return len(self._been_through(read_parts(self.folder))) == len(self.lots)

    def finish(self) -> Extracted:
        """Make one data set of the parts; nobody else is at work."""
        parts = read_parts(self.folder)
        lists = self._been_through(parts).values()
        # An image whose samples fall into two lots is listed in both.
        skipped = tuple(dict.fromkeys(Skipped(*item) for found in lists for item in found))
        if not any(manifest.shards for manifest in parts.values()):
            for path in parts:
                path.unlink()
            raise ValueError(f"{self.folder}: nothing to write; {_why_nothing(skipped)}")
        _list_skipped(self.folder, skipped)
        manifest = merge_parts(self.folder, {"skipped": len(skipped)})
        remove_leftovers(self.folder, "*")  # of others that were killed meanwhile
        return Extracted(manifest.samples, self.added, skipped)

    def _mine(self) -> Iterator[Lot]:
        """Lots that nobody else has and that this run has not been through."""
        for lot in self.lots:
            if self.claims is not None and not self.claims.take(lot.number):
                continue
            if self.writer.listed(lot.part).notes.get("run") == self.name:
                self._release(lot)
                continue
            if self.claims is not None:
                # Another process may have got so far before it died.
                self.writer.take_over(lot.part)
            yield lot

    def _end(self, lot: Lot) -> None:
        self.writer.end({"run": self.name, "skipped": lot.skipped})
        self._release(lot)

    def _release(self, lot: Lot) -> None:
        if self.claims is not None:
            self.claims.release(lot.number)

    def _been_through(self, parts: Mapping[Path, Manifest]) -> dict[Path, list[list[str]]]:
        """What was skipped in each lot that this run has been through, in order."""
        ours = {part_path(self.folder, lot.part) for lot in self.lots}
        return {
            path: manifest.notes["skipped"]
            for path, manifest in parts.items()
            if path in ours and manifest.notes.get("run") == self.name
        }


def _facts(towers: TowerPair, settings: ExtractionSettings) -> Manifest:
    for tower in towers:
        if settings.include_cls and not tower.has_cls:
            raise ValueError(f"include_cls: {tower.name} has no CLS token; use no_include_cls")
    if towers.eva.grid != towers.clip.grid:
        raise ValueError(f"towers: expected one grid, got {towers.eva.grid}, {towers.clip.grid}")
    down, across = towers.eva.grid
    return Manifest(
        tokens=down * across + settings.include_cls,
        has_cls=settings.include_cls,
        grid=(1, down, across),
        eva_width=towers.eva.width,
        clip_width=towers.clip.width,
        dtype=settings.dtype,
        eva_encoder=towers.eva.origin(),
        clip_encoder=towers.clip.origin(),
        split=settings.split,
    )


def _why_nothing(skipped: tuple[Skipped, ...]) -> str:
    if not skipped:
        return "there were no images"
    first = f"{skipped[0].key}: {skipped[0].reason}"
    return f"{len(skipped)} images could not be read, the first is {first}"


def _list_skipped(folder: Path, skipped: tuple[Skipped, ...]) -> None:
    path = folder / SKIPPED_FILE
    if skipped:
        lines = (json.dumps(item._asdict()) + "\n" for item in skipped)
        write_atomically(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)
