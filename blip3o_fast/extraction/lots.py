"""Images in lots: what one process encodes at a time, and writes as shards of its own.

A list of images is cut where ``samples_per_shard`` samples are full, counting those that cannot be
read, so that each lot is one shard. A tar is a lot, however large it is. Lots therefore depend on
the images and the settings alone, and not on who encodes them or on what turns out to be
unreadable.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from blip3o_fast.extraction.image_sources import ImageRef, TarImages
from blip3o_fast.extraction.images import UnreadableImage
from blip3o_fast.extraction.views import ExtractionSettings, count_views, view_keys

Images = Iterable[ImageRef] | Sequence[TarImages]
"""What is extracted: images, or whole tars of them."""


class Skipped(NamedTuple):
    """An image that gave no sample, and why."""

    key: str
    reason: str


@dataclass(eq=False)
class Lot:
    """Some images and the keys of their samples.

    Attributes:
        number: among the lots, from 0.
        images: each with the keys of those of its samples that belong to this lot.
        skipped: images that could not be read, once they were tried.
    """

    number: int
    images: Iterator[tuple[ImageRef, list[str]]]
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def part(self) -> str:
        """Name of what a ``ShardWriter`` writes for it."""
        return f"lot{self.number:05d}"


class Lots:
    """All images, lot by lot.

    Attributes:
        samples: of all lots, if all images can be read; None where tars would have to be read.
    """

    def __init__(self, images: Images, settings: ExtractionSettings) -> None:
        listed = list(images)
        self._settings = settings
        self._tars = [item for item in listed if isinstance(item, TarImages)]
        self._refs = list(_once(item for item in listed if isinstance(item, ImageRef)))
        self._starts: list[tuple[int, int]] = []  # image, and its first sample, of each lot
        before, full = 0, settings.samples_per_shard
        for i, ref in enumerate(self._refs):
            views = count_views(ref, settings)
            self._starts += [(i, first) for first in range(-before % full, views, full)]
            before += views
        self.samples = None if self._tars else before

    def __len__(self) -> int:
        return len(self._tars) or len(self._starts)

    def __iter__(self) -> Iterator[Lot]:
        for number in range(len(self)):
            images = self._of_tar(number) if self._tars else self._of_list(number)
            yield Lot(number, images)

    def digest(self) -> bytes:
        """SHA-256 of what decides the samples and how they are computed together."""
        settings = self._settings
        facts = [settings.samples_per_shard, settings.batch_size, settings.seed, settings.mirror]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tar in self._tars:
            digest.update(json.dumps([tar.label, tar.crops]).encode())
        for ref in self._refs:
            digest.update(json.dumps([ref.key, ref.crops]).encode())
        return digest.digest()

    def _of_tar(self, number: int) -> Iterator[tuple[ImageRef, list[str]]]:
        return ((ref, view_keys(ref, self._settings)) for ref in _once(self._tars[number]))

    def _of_list(self, number: int) -> Iterator[tuple[ImageRef, list[str]]]:
        first, skip = self._starts[number]
        last, stop = (*self._starts, (len(self._refs), 0))[number + 1 :][0]
        for i in range(first, min(last + 1, len(self._refs))):
            keys = view_keys(self._refs[i], self._settings)
            keys = keys[skip if i == first else 0 : stop if i == last else None]
            if keys:
                yield self._refs[i], keys


def _once(images: Iterable[ImageRef]) -> Iterator[ImageRef]:
    """Images; of those with one key, all but the first are marked as unreadable."""
    seen: set[str] = set()
    for ref in images:
        if ref.key in seen:
            yield ref._replace(data=UnreadableImage("the key appeared before"))
        else:
            yield ref
        seen.add(ref.key)
