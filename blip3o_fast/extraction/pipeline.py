"""From lots of images to batches of tokens: everything runs ahead of the consumer, in order.

    lots -> threads: decode, crop, resize -> batches -> threads: both towers

On a CPU each batch runs on one thread, which is several times faster on a shared machine than
splitting each operator among threads. A batch holds samples of one shard only, so that which
samples are encoded together does not depend on what was encoded before.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.devices import DTYPES
from blip3o_fast.extraction.encoders import Tower, TowerPair
from blip3o_fast.extraction.image_sources import ImageRef
from blip3o_fast.extraction.images import UnreadableImage, image_bytes, to_pixels
from blip3o_fast.extraction.lots import Lot, Skipped
from blip3o_fast.extraction.views import ExtractionSettings, open_views


class Known(NamedTuple):
    """Samples that need not be made again, and what they were made from where that is recorded."""

    done: Set[str]
    digests: Mapping[str, str]


class Encoded(NamedTuple):
    """One batch of a lot, on the CPU in the shards' dtype; the last one of a lot may be empty."""

    lot: Lot
    records: list[SampleRecord]
    eva: Tensor | None
    clip: Tensor | None
    is_last: bool


class _View(NamedTuple):
    """One sample before the towers: its record and each tower's pixels, uint8 ``[3, S, S]``."""

    record: SampleRecord
    eva: Tensor
    clip: Tensor


class _Batch(NamedTuple):
    lot: Lot
    views: list[_View]
    is_last: bool


def encode_lots(
    lots: Iterable[Lot],
    towers: TowerPair,
    settings: ExtractionSettings,
    known: Known,
    *,
    limit: int | None = None,
    seen: Callable[[int], object] = lambda _: None,
) -> Generator[Encoded]:
    """Encode what is not known yet, lot by lot.

    Args:
        lots: pulled in the caller's thread; of each, ``skipped`` is complete with its last batch.
        towers: the pair.
        settings: see ``ExtractionSettings``.
        known: looked at when an image is opened, which is ahead of its lot's first batch.
        limit: stop after so many samples; None: encode all.
        seen: called with the number of samples of each image that was opened.

    Raises:
        ValueError: naming an image that samples were made from and that has changed since.
    """
    opened = _opened(lots, towers, settings, known, seen)
    return _encoded(_batches(opened, settings, limit), towers, settings)


def _opened(
    lots: Iterable[Lot],
    towers: TowerPair,
    settings: ExtractionSettings,
    known: Known,
    seen: Callable[[int], object],
) -> Iterator[tuple[Lot, list[_View] | None]]:
    """The samples of each image, in order; None after the last image of a lot."""

    def finished(
        lot: Lot, ref: ImageRef, keys: list[str], future: "Future[list[_View]]"
    ) -> tuple[Lot, list[_View]]:
        seen(len(keys))
        try:
            return lot, future.result()
        except UnreadableImage as error:
            lot.skipped.append(Skipped(ref.key, str(error)))
            return lot, []

    with ThreadPoolExecutor(settings.workers) as pool:
        ahead: deque[tuple[Lot, ImageRef, list[str], Future[list[_View]]] | Lot] = deque()

        def first() -> tuple[Lot, list[_View] | None]:
            item = ahead.popleft()
            return (item, None) if isinstance(item, Lot) else finished(*item)

        try:
            for lot in lots:
                for ref, keys in lot.images:
                    future = pool.submit(_open, ref, keys, towers, settings, known)
                    ahead.append((lot, ref, keys, future))
                    if len(ahead) > 2 * settings.workers:
                        yield first()
                ahead.append(lot)
            while ahead:
                yield first()
        finally:
            for item in ahead:
                if not isinstance(item, Lot):
                    item[-1].cancel()


def _open(
    ref: ImageRef,
    keys: list[str],
    towers: TowerPair,
    settings: ExtractionSettings,
    known: Known,
) -> list[_View]:
    """Those of some samples of an image that are not known.

    Raises:
        UnreadableImage: with the reason.
        ValueError: if a known sample was made from another image or caption.
    """
    if isinstance(ref.data, UnreadableImage):
        raise ref.data
    wanted = {key for key in keys if key not in known.done}
    recorded = {known.digests[key] for key in keys if key in known.digests}
    if not wanted and not recorded:
        return []
    encoded = image_bytes(ref.data)
    digest = hashlib.sha256(encoded + b"\0" + ref.caption.encode(errors="replace")).hexdigest()
    if not recorded <= {digest}:
        raise ValueError(
            f"{ref.key}: expected the image and the caption that its samples were made from, got "
            "others; restore them, or choose an empty folder"
        )
    if not wanted:
        return []
    found = []
    for key, image in open_views(ref._replace(data=encoded), settings):
        if key in wanted:
            eva = to_pixels(image, towers.eva.preprocessing.size)
            same = towers.clip.preprocessing.size == towers.eva.preprocessing.size
            clip = eva if same else to_pixels(image, towers.clip.preprocessing.size)
            found.append(_View(SampleRecord(key, ref.caption, ref.source, digest), eva, clip))
    return found


def _batches(
    opened: Iterator[tuple[Lot, list[_View] | None]],
    settings: ExtractionSettings,
    limit: int | None,
) -> Iterator[_Batch]:
    """At most ``batch_size`` samples of one shard together, and whatever ends a lot."""
    batch: list[_View] = []
    count = in_lot = 0
    while limit is None or count < limit:
        lot, views = next(opened, (None, None))
        if lot is None:
            return
        if views is None:
            yield _Batch(lot, batch, is_last=True)
            batch, in_lot = [], 0
        for view in views or ():
            batch.append(view)
            count, in_lot = count + 1, in_lot + 1
            if count == limit:
                yield _Batch(lot, batch, is_last=True)
                return
            if len(batch) == settings.batch_size or in_lot % settings.samples_per_shard == 0:
                yield _Batch(lot, batch, is_last=False)
                batch = []


def _encoded(
    batches: Iterator[_Batch], towers: TowerPair, settings: ExtractionSettings
) -> Generator[Encoded]:
    """Run the towers ahead, and yield in the order of ``batches``."""
    on_cpu = any(tower.device.type == "cpu" for tower in towers)
    threads = torch.get_num_threads() if on_cpu else 1
    with ThreadPoolExecutor(threads, initializer=_one_thread_an_operator) as pool:
        ahead: deque[Future[Encoded]] = deque()
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


def _encode(batch: _Batch, towers: TowerPair, settings: ExtractionSettings) -> Encoded:
    lot, views, is_last = batch
    if not views:
        return Encoded(lot, [], None, None, is_last)
    eva_pixels = torch.stack([view.eva for view in views])
    same = views[0].clip is views[0].eva
    clip_pixels = eva_pixels if same else torch.stack([view.clip for view in views])
    # Both towers are queued before the first result is awaited.
    eva = _tokens(towers.eva, eva_pixels, settings)
    clip = _tokens(towers.clip, clip_pixels, settings)
    return Encoded(lot, [view.record for view in views], eva.cpu(), clip.cpu(), is_last)


def _tokens(tower: Tower, pixels: Tensor, settings: ExtractionSettings) -> Tensor:
    tokens = tower.encode(pixels).to(DTYPES[settings.dtype])
    return tokens[:, 1:] if tower.has_cls and not settings.include_cls else tokens
