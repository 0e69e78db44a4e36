"""From an image to the samples that it gives, and back from a sample's key to what it shows.

The whole image is one sample under the image's own key. Crop n of the generator of (image, seed)
has the key ``image#seed.n``, and ``image#seed.nm`` mirrored: a key says all there is to cut it
again.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blip3o_fast.checked import Count, check
from blip3o_fast.data.manifest import Split
from blip3o_fast.extraction.image_sources import ImageRef
from blip3o_fast.extraction.images import UnreadableImage, load_rgb, pillow
from blip3o_fast.words import DtypeName

if TYPE_CHECKING:
    from PIL.Image import Image

# The shortest crop: this share of the image's short side, and this many pixels where it has them.
CROP_SHARE = 0.35
CROP_PIXELS = 192


@dataclass(frozen=True)
class ExtractionSettings:
    """How images become samples.

    Attributes:
        include_cls: keep the towers' CLS token.
        dtype: of the shards: ``fp16``, ``bf16`` or ``fp32``.
        samples_per_shard: rows of a full shard; a shard holds images of one tar only.
        batch_size: images a forward pass.
        workers: threads that decode images.
        max_samples: stop when the folder holds so many; None takes all.
        seed: of the random crops.
        mirror: take each random crop mirrored as well.
        split: what the manifest holds out of training.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    include_cls: bool = False
    dtype: DtypeName = "fp16"
    samples_per_shard: Count = 256
    batch_size: Count = 16
    workers: Count = 2
    max_samples: Count | None = None
    seed: int = 0
    mirror: bool = False
    split: Split = field(default_factory=Split)

    def __post_init__(self) -> None:
        check(self)


def count_views(ref: ImageRef, settings: ExtractionSettings) -> int:
    """How many samples an image gives."""
    return ref.crops * (1 + settings.mirror) if ref.crops else 1


def view_keys(ref: ImageRef, settings: ExtractionSettings) -> list[str]:
    """Keys of the samples of an image, in the order of ``open_views``."""
    if ref.crops == 0:
        return [ref.key]
    sides = ("", "m") if settings.mirror else ("",)
    return [f"{ref.key}#{settings.seed}.{n}{side}" for n in range(ref.crops) for side in sides]


def open_views(ref: ImageRef, settings: ExtractionSettings) -> Iterator[tuple[str, "Image"]]:
    """Decode an image and yield its samples as (key, RGB image).

    Raises:
        UnreadableImage: with the reason.
    """
    if isinstance(ref.data, UnreadableImage):
        raise ref.data
    image = load_rgb(ref.data)
    if ref.crops == 0:
        yield ref.key, image
        return
    rng = crop_rng(ref.key, settings.seed)
    views = crops(image, ref.crops, rng, mirror=settings.mirror)
    yield from zip(view_keys(ref, settings), views, strict=True)


def open_view(ref: ImageRef, key: str, settings: ExtractionSettings) -> "Image":
    """The RGB image of one sample of ``ref``.

    Raises:
        ValueError: when these settings give the image no such sample.
        UnreadableImage: with the reason.
    """
    for name, image in open_views(ref, settings):
        if name == key:
            return image
    raise ValueError(
        f"{key}: expected a sample of {ref.key}, such as {view_keys(ref, settings)[0]}"
    )


def crops(
    image: "Image", count: int, rng: random.Random, *, mirror: bool = False
) -> Iterator["Image"]:
    """Random squares of an image at random scales.

    Sides are uniform between the larger of 35 % of the short side and 192 pixels (the whole short
    side where that is less) and the short side. The first crops do not depend on ``count``.

    Args:
        image: at least 1 x 1.
        count: crops.
        rng: their source; ``crop_rng`` makes the one of a photo and a seed.
        mirror: yield the mirrored copy after each crop, ``2 * count`` images in all.
    """
    width, height = image.size
    short = min(width, height)
    least = min(short, max(CROP_PIXELS, round(CROP_SHARE * short)))
    for _ in range(count):
        side = rng.randint(least, short)
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        crop = image.crop((left, top, left + side, top + side))
        yield crop
        if mirror:
            yield crop.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)


def crop_rng(key: str, seed: int) -> random.Random:
    """The generator of one photo's crops: a function of its key and the seed, on every platform."""
    return random.Random(f"{seed}:{key}")
