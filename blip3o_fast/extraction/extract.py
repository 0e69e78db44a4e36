"""Images to paired shards.

    references -> threads: decode, crop, resize -> batches -> threads: both towers -> ShardWriter

Everything runs ahead of the writer, in order. On a CPU each batch runs on one thread, which is
several times faster on a shared machine than splitting each operator among threads. A sample's key
names its image and crop, so an interrupted extraction skips the keys that finished shards hold; the
digests beside the keys show whether they were made from the same images and captions.
Images that cannot be read are listed in ``skipped.jsonl``, one ``{"key": ..., "reason": ...}`` per
line, and tried again by the next run.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from blip3o_fast.atomic import write_atomically
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.shards import SampleRecord, ShardWriter
from blip3o_fast.devices import DTYPES
from blip3o_fast.extraction.encoders import Tower, TowerPair
from blip3o_fast.extraction.image_sources import ImageRef
from blip3o_fast.extraction.images import UnreadableImage, image_bytes, pillow, to_pixels
from blip3o_fast.extraction.views import ExtractionSettings, open_view, open_views, view_keys

__all__ = ["Extracted", "ExtractionSettings", "Skipped", "Stopped", "extract", "open_view"]

SKIPPED_FILE = "skipped.jsonl"
DEFAULTS = ExtractionSettings()


class Skipped(NamedTuple):
    """An image that gave no sample, and why."""

    key: str
    reason: str


class Extracted(NamedTuple):
    """Result of an extraction: samples in the folder, those of this run, and skipped images."""

    samples: int
    added: int
    skipped: tuple[Skipped, ...]


class Stopped(Exception):
    """The extraction was asked to stop; the shards so far are complete and can be resumed."""


class _View(NamedTuple):
    """One sample before the towers: its record and each tower's pixels, uint8 ``[3, S, S]``."""

    record: SampleRecord
    eva: Tensor
    clip: Tensor


class _Encoded(NamedTuple):
    """One batch after the towers, on the CPU in the shards' dtype."""

    eva: Tensor
    clip: Tensor
    records: list[SampleRecord]


def extract(
    images: Iterable[ImageRef],
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
        images: in an order that does not change between runs.
        towers: the pair.
        folder: of the shards; created if need be.
        settings: see ``ExtractionSettings``.
        resume: continue a folder that holds shards of the same towers and layout.
        progress: show a bar of images.
        stop: asked after every batch; when true, the shard in progress is finished and ``Stopped``
            raised.

    Raises:
        ValueError: on settings that do not fit the towers, a folder of other shards, features that
            are not finite (naming the sample), or when there is nothing to write.
        ImportError: without Pillow, naming the extra.
        Stopped: when ``stop`` said so.
    """
    pillow()
    facts = _facts(towers, settings)
    skipped: list[Skipped] = []
    writer = ShardWriter(
        folder, facts=facts, samples_per_shard=settings.samples_per_shard, resume=resume
    )
    before = len(writer.done)
    total = len(images) if isinstance(images, Sized) else None
    bar = tqdm(images, "extract", total, unit="image", disable=not progress)
    try:
        with writer:
            views = _views(bar, towers, settings, writer, skipped)
            for batch in _encoded(_batches(views, settings, before), towers, settings):
                writer.add(*batch)
                if stop():
                    writer.flush()
                    raise Stopped(f"stopped with {len(writer.done)} samples in {folder}")
            if not writer.done:
                raise ValueError(f"{folder}: nothing to write; {_why_nothing(skipped)}")
            writer.notes["skipped"] = len(skipped)
    finally:
        bar.close()
        _list_skipped(Path(folder), skipped)
    return Extracted(len(writer.done), len(writer.done) - before, tuple(skipped))


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


def _views(
    images: Iterable[ImageRef],
    towers: TowerPair,
    settings: ExtractionSettings,
    writer: ShardWriter,
    skipped: list[Skipped],
) -> Iterator[_View]:
    """Decode ahead in threads, and yield in the order of ``images``."""
    done, digests = frozenset(writer.done), dict(writer.digests)
    with ThreadPoolExecutor(settings.workers) as pool:
        ahead: deque[tuple[ImageRef, Future[list[_View]]]] = deque()
        try:
            for ref in _wanted(images, skipped):
                ahead.append((ref, pool.submit(_open, ref, towers, settings, done, digests)))
                if len(ahead) > 2 * settings.workers:
                    yield from _finished(*ahead.popleft(), skipped)
            while ahead:
                yield from _finished(*ahead.popleft(), skipped)
        finally:
            for _, future in ahead:
                future.cancel()


def _wanted(images: Iterable[ImageRef], skipped: list[Skipped]) -> Iterator[ImageRef]:
    """List repeated keys and unreadable images, and leave them out."""
    seen: set[str] = set()
    for ref in images:
        if isinstance(ref.data, UnreadableImage):
            skipped.append(Skipped(ref.key, str(ref.data)))
        elif ref.key in seen:
            skipped.append(Skipped(ref.key, "the key appeared before"))
        else:
            yield ref
        seen.add(ref.key)


def _open(
    ref: ImageRef,
    towers: TowerPair,
    settings: ExtractionSettings,
    done: frozenset[str],
    digests: Mapping[str, str],
) -> list[_View]:
    """The samples of an image that no earlier run wrote.

    Raises:
        UnreadableImage: with the reason.
        ValueError: if an earlier run made samples from another image or caption.
    """
    keys = view_keys(ref, settings)
    recorded = {digests[key] for key in keys if key in digests}
    if done.issuperset(keys) and not recorded:
        return []
    assert not isinstance(ref.data, UnreadableImage)
    encoded = image_bytes(ref.data)
    digest = hashlib.sha256(encoded + b"\0" + ref.caption.encode(errors="replace")).hexdigest()
    if not recorded <= {digest}:
        raise ValueError(
            f"{ref.key}: expected the image and the caption that its samples were made from, got "
            "others; restore them, or choose an empty folder"
        )
    if done.issuperset(keys):
        return []
    found = []
    for key, image in open_views(ref._replace(data=encoded), settings):
        if key not in done:
            eva = to_pixels(image, towers.eva.preprocessing.size)
            same = towers.clip.preprocessing.size == towers.eva.preprocessing.size
            clip = eva if same else to_pixels(image, towers.clip.preprocessing.size)
            found.append(_View(SampleRecord(key, ref.caption, ref.source, digest), eva, clip))
    return found


def _finished(
    ref: ImageRef, future: "Future[list[_View]]", skipped: list[Skipped]
) -> Iterator[_View]:
    try:
        yield from future.result()
    except UnreadableImage as error:
        skipped.append(Skipped(ref.key, str(error)))


def _batches(
    views: Iterator[_View], settings: ExtractionSettings, before: int
) -> Iterator[list[_View]]:
    limit = None if settings.max_samples is None else settings.max_samples - before
    batch: list[_View] = []
    while limit is None or limit > 0:
        view = next(views, None)
        if view is not None:
            batch.append(view)
            limit = None if limit is None else limit - 1
        if batch and (view is None or limit == 0 or len(batch) == settings.batch_size):
            yield batch
            batch = []
        if view is None:
            return


def _encoded(
    batches: Iterator[list[_View]], towers: TowerPair, settings: ExtractionSettings
) -> Iterator[_Encoded]:
    """Run the towers ahead, and yield in the order of ``batches``."""
    on_cpu = any(tower.device.type == "cpu" for tower in towers)
    threads = torch.get_num_threads() if on_cpu else 1
    with ThreadPoolExecutor(threads, initializer=_one_thread_an_operator) as pool:
        ahead: deque[Future[_Encoded]] = deque()
        try:
            for batch in batches:
                ahead.append(pool.submit(_encode, batch, towers, settings))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _one_thread_an_operator() -> None:
    # The setting belongs to the calling thread; the rest of the process keeps its own.
    torch.set_num_threads(1)


def _encode(batch: list[_View], towers: TowerPair, settings: ExtractionSettings) -> _Encoded:
    eva_pixels = torch.stack([view.eva for view in batch])
    same = batch[0].clip is batch[0].eva
    clip_pixels = eva_pixels if same else torch.stack([view.clip for view in batch])
    # Both towers are queued before the first result is awaited.
    eva = _tokens(towers.eva, eva_pixels, settings)
    clip = _tokens(towers.clip, clip_pixels, settings)
    return _Encoded(eva.cpu(), clip.cpu(), [view.record for view in batch])


def _tokens(tower: Tower, pixels: Tensor, settings: ExtractionSettings) -> Tensor:
    tokens = tower.encode(pixels).to(DTYPES[settings.dtype])
    return tokens[:, 1:] if tower.has_cls and not settings.include_cls else tokens


def _why_nothing(skipped: list[Skipped]) -> str:
    if not skipped:
        return "there were no images"
    first = f"{skipped[0].key}: {skipped[0].reason}"
    return f"{len(skipped)} images could not be read, the first is {first}"


def _list_skipped(folder: Path, skipped: list[Skipped]) -> None:
    path = folder / SKIPPED_FILE
    if skipped and folder.is_dir():
        lines = (json.dumps(item._asdict()) + "\n" for item in skipped)
        write_atomically(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)
