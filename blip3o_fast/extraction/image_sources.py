"""Where images come from: a folder, webdataset tars, or COCO captions.

Each source yields ``ImageRef`` in an order that depends on its files alone, so that an interrupted
extraction can go on where it stopped.
"""

import glob
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from blip3o_fast.data.tars import require_end
from blip3o_fast.extraction.images import UnreadableImage

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pgm", "png", "ppm"),
        *("tif", "tiff", "webp"),
    )
)
TAR_IMAGES = ("jpg", "jpeg", "png", "webp")
TAR_CAPTIONS = ("txt", "caption", "text")
MAX_FILE_BYTES = 1 << 28
"""Largest image file that is read from a tar."""

MAX_CAPTION_BYTES = 1 << 16


class ImageRef(NamedTuple):
    """An image that can be opened.

    Attributes:
        key: names the sample.
        caption: text about it, or empty.
        source: the photo it shows; samples that share one fall on the same side of a split.
        data: its path, its encoded bytes, or why it could not be read.
        crops: random square crops to take instead of the whole image; 0 takes the whole.
    """

    key: str
    caption: str
    source: str
    data: Path | bytes | UnreadableImage
    crops: int = 0


def folder_images(folder: str | Path) -> list[ImageRef]:
    """Image files below a folder, by path; ``photo.txt`` beside ``photo.jpg`` is its caption.

    Raises:
        FileNotFoundError: when the folder is missing or holds no image file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of images")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not paths:
        raise FileNotFoundError(f"{root}: expected image files ({', '.join(sorted(EXTENSIONS))})")
    return [_file_ref(root, path) for path in paths]


def webdataset_images(pattern: str) -> Iterator[ImageRef]:
    """Images of webdataset tars, with the caption that follows or precedes each.

    Members that share a name up to the first dot of their last part belong to one sample; the
    sample's key is the tar's name and that name. A truncated tar yields the samples before the
    break and then a reference that holds the reason.

    Args:
        pattern: a path, a glob (``shards/*.tar``) or a brace range (``{00000..00031}.tar``).

    Raises:
        FileNotFoundError: when a named tar is missing or the glob matches none.
        ValueError: when a brace range is malformed.
    """
    tars = _expand(pattern)
    common = Path(os.path.commonpath([path.parent for path in tars]))
    labels = [path.relative_to(common).with_suffix("").as_posix() for path in tars]
    return itertools.chain.from_iterable(map(_tar_images, tars, labels))


def coco_images(root: str | Path, split: str = "val2017") -> list[ImageRef]:
    """Images of MS-COCO with their first caption, in the order of the annotation file.

    Args:
        root: holds ``annotations/captions_{split}.json`` and the images in ``{split}`` or
            ``images/{split}``.
        split: ``val2017``, ``train2017`` or another.

    Raises:
        FileNotFoundError: when the annotations or the image folder are missing.
        ValueError: when the annotations are malformed.
    """
    root = Path(root)
    annotations = root / "annotations" / f"captions_{split}.json"
    folders = [f for f in (root / split, root / "images" / split) if f.is_dir()]
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations}: expected the caption annotations of COCO")
    if not folders:
        raise FileNotFoundError(f"{root}: expected the images in {split} or images/{split}")
    try:
        values = json.loads(annotations.read_bytes())
        captions: dict[int, str] = {}
        for annotation in values["annotations"]:
            captions.setdefault(int(annotation["image_id"]), str(annotation["caption"]).strip())
        images = [(int(image["id"]), str(image["file_name"])) for image in values["images"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{annotations}: expected COCO caption annotations ({reason})") from None
    for _, name in images:
        if PurePosixPath(name).name != name or "\\" in name:
            raise ValueError(f"{annotations}: expected plain file names, got {name!r}")
    return [
        ImageRef(f"coco_{ident}", captions.get(ident, ""), f"{split}/{name}", folders[0] / name)
        for ident, name in images
    ]


def _file_ref(root: Path, path: Path) -> ImageRef:
    key = path.relative_to(root).as_posix()
    return ImageRef(key, read_caption(path.with_suffix(".txt")), key, path)


def read_caption(path: Path) -> str:
    """The text of a caption file, or empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(MAX_CAPTION_BYTES).decode("utf-8", errors="replace").strip()


def _expand(pattern: str) -> list[Path]:
    names = [pattern]
    while "{" in names[0]:
        names = [one for name in names for one in _expand_brace(name)]
    if any(mark in pattern for mark in "*?["):
        names = sorted({match for name in names for match in glob.glob(name)})  # noqa: PTH207
    paths = [Path(name) for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such tar")
    if not paths:
        raise FileNotFoundError(f"{pattern}: expected webdataset tars, found none")
    return paths


def _expand_brace(name: str) -> list[str]:
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if brace is None:
        raise ValueError(f"{name}: expected a brace range such as {{00000..00031}}")
    first, last = brace[1], brace[2]
    return [
        f"{name[: brace.start()]}{number:0{len(first)}d}{name[brace.end() :]}"
        for number in range(int(first), int(last) + 1)
    ]


def _tar_images(path: Path, label: str) -> Iterator[ImageRef]:
    try:
        with tarfile.open(path) as tar:
            members = (member for member in tar if member.isfile())
            for name, group in itertools.groupby(members, key=lambda m: _sample_name(m.name)[0]):
                ref = _tar_ref(tar, f"{label}/{name}", list(group))
                if ref is not None:
                    yield ref
            require_end(tar)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = f"damaged tar: {str(error).partition(chr(10))[0] or type(error).__name__}"
        yield ImageRef(f"{label}.tar", "", f"{label}.tar", UnreadableImage(reason))


def _tar_ref(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]) -> ImageRef | None:
    by_extension = {_sample_name(member.name)[1]: member for member in members}
    images = [by_extension[e] for e in TAR_IMAGES if e in by_extension]
    captions = [by_extension[e] for e in TAR_CAPTIONS if e in by_extension]
    if not images:
        return None
    caption = _read_member(tar, captions[0])[:MAX_CAPTION_BYTES] if captions else b""
    data: bytes | UnreadableImage = UnreadableImage(f"file of {images[0].size} bytes")
    if images[0].size <= MAX_FILE_BYTES:
        data = _read_member(tar, images[0])
    text = caption.decode("utf-8", errors="replace").strip()
    return ImageRef(key, text, key, data)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    data = file.read(MAX_FILE_BYTES) if file else b""
    if len(data) < min(member.size, MAX_FILE_BYTES):
        raise EOFError(f"{member.name} breaks off")
    return data


def _sample_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
