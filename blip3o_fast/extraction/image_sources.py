"""Where images come from: a folder, webdataset tars, or COCO captions.

Each source yields ``ImageRef`` in an order that depends on its files alone, so that an interrupted
extraction can go on where it stopped. What looks like an image and is none that can be read is not
passed over: its reference holds the reason.
"""

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from blip3o_fast.checked import read_json
from blip3o_fast.data.tars import CAPTIONS, decode_caption, open_tar, split_name, tar_files
from blip3o_fast.extraction.images import MAX_FILE_BYTES, UnreadableImage
from blip3o_fast.untrusted import reading, reason

IMAGES = (
    *("avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pgm", "png", "ppm"),
    *("tif", "tiff", "webp"),
)
"""Types that are read, by suffix."""
EXTENSIONS = frozenset(f".{name}" for name in IMAGES)
OTHER_IMAGES = (
    *("arw", "cr2", "dds", "dng", "eps", "heic", "heif", "icns", "ico", "j2k", "jp2", "jxl", "nef"),
    *("pbm", "pcx", "pnm", "psd", "raw", "svg", "tga", "wmf", "xcf"),
)
"""Types that are listed as skipped."""
MAX_CAPTION_BYTES = 1 << 16
_MOST_TARS = 1_000_000


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

    Links to folders are followed; each folder is read once.

    Raises:
        FileNotFoundError: when the folder is missing or holds no image file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of images")
    files = [path for path in _files(root) if not path.name.startswith("._")]
    captions = {
        path.with_suffix(path.suffix.lower()): path
        for path in files
        if path.suffix[1:].lower() in CAPTIONS
    }
    refs = []
    for path in sorted(files):
        key, kind = path.relative_to(root).as_posix(), path.suffix[1:].lower()
        if kind in OTHER_IMAGES:
            refs.append(_left_out(key, f"images of type {kind} are not read"))
        elif kind in IMAGES:
            texts = (captions.get(path.with_suffix(f".{suffix}")) for suffix in CAPTIONS)
            text = next((_read_caption(found) for found in texts if found is not None), "")
            refs.append(ImageRef(key, text, key, path))
    if not refs:
        raise FileNotFoundError(f"{root}: expected image files ({', '.join(sorted(EXTENSIONS))})")
    return refs


@dataclass(frozen=True)
class TarImages:
    """Images of one webdataset tar, with the caption that follows or precedes each.

    Members that share a name up to their type belong to one sample; the sample's key is the tar's
    label and that name. A truncated tar yields the samples before the break and then a reference
    that holds the reason.
    """

    path: Path
    label: str
    crops: int = 0

    def __iter__(self) -> Iterator[ImageRef]:
        for ref in _tar_images(self.path, self.label):
            yield ref._replace(crops=self.crops)


def webdataset_images(pattern: str) -> Iterator[ImageRef]:
    """Images of webdataset tars, one tar after another; see ``webdataset_tars``."""
    return itertools.chain.from_iterable(webdataset_tars(pattern))


def webdataset_tars(pattern: str) -> list[TarImages]:
    """Webdataset tars, in order. A tar's label is its path below the folder that all share.

    Args:
        pattern: a path, a glob (``shards/*.tar``) or a brace range (``{00000..00031}.tar``). What
            exists under that very name is a path.

    Raises:
        FileNotFoundError: when a named tar is missing or the glob matches none.
        ValueError: when a brace range is reversed or too long, or when samples of two tars could
            have the same key.
    """
    paths = _expand(pattern)
    common = Path(os.path.commonpath([path.parent for path in paths]))
    tars = [TarImages(path, path.relative_to(common).with_suffix("").as_posix()) for path in paths]
    by_label = sorted(tars, key=lambda tar: f"{tar.label}/")
    for tar, other in itertools.pairwise(by_label):
        if f"{other.label}/".startswith(f"{tar.label}/"):
            raise ValueError(
                f"{other.path}: its samples could have the same keys as those of {tar.path}; "
                "expected tars whose names differ, and not a folder named like a tar beside it"
            )
    return tars


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
    with reading(annotations, "COCO caption annotations"):
        values = read_json(annotations)
        captions: dict[str, str] = {}
        for annotation in values["annotations"]:
            captions.setdefault(
                str(int(annotation["image_id"])), str(annotation["caption"]).strip()
            )
        images = [(str(int(image["id"])), str(image["file_name"])) for image in values["images"]]
    for _, name in images:
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{annotations}: expected plain file names, got {name!r}")
    return [
        ImageRef(f"coco_{ident}", captions.get(ident, ""), f"{split}/{name}", folders[0] / name)
        for ident, name in images
    ]


def _left_out(key: str, why: str) -> ImageRef:
    return ImageRef(key, "", key, UnreadableImage(why))


def _files(root: Path) -> Iterator[Path]:
    """Whatever is no folder, below ``root`` and below links to folders, each folder once."""
    folders, links, seen = [root], [], set()
    while folders or links:
        # Links come last, so that a folder goes by its own name where it has one here.
        folder = folders.pop() if folders else links.pop(0)
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)


def _read_caption(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return decode_caption(file.read(MAX_CAPTION_BYTES))


def _expand(pattern: str) -> list[Path]:
    if Path(pattern).is_file():
        return [Path(pattern)]
    paths: list[Path] = []
    for name in _expand_braces(pattern):
        if not Path(name).is_file() and glob.has_magic(name):
            matches = sorted(glob.glob(name))  # noqa: PTH207
            paths.extend(path for path in map(Path, matches) if path.is_file())
        else:
            paths.append(Path(name))
    for path in paths:
        if not path.is_file():
            hint = "; a brace range looks like {00000..00031}" if "{" in path.name else ""
            raise FileNotFoundError(f"{path}: no such tar{hint}")
    if not paths:
        raise FileNotFoundError(f"{pattern}: expected webdataset tars, found none")
    return sorted(set(paths)) if glob.has_magic(pattern) else paths


def _expand_braces(name: str) -> list[str]:
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if brace is None:
        return [name]
    first, last = int(brace[1]), int(brace[2])
    if not 0 <= last - first < _MOST_TARS:
        raise ValueError(
            f"{name}: expected an ascending range of at most {_MOST_TARS} tars, got {brace[0]}"
        )
    rest = _expand_braces(name[brace.end() :])
    start, width = name[: brace.start()], len(brace[1])
    if (last - first + 1) * len(rest) > _MOST_TARS:
        raise ValueError(f"{name}: expected at most {_MOST_TARS} tars")
    return [f"{start}{n:0{width}d}{end}" for n in range(first, last + 1) for end in rest]


def _tar_images(path: Path, label: str) -> Iterator[ImageRef]:
    try:
        with open_tar(path, "r:*") as tar:
            known = (
                (name, *split_name(name, (*IMAGES, *OTHER_IMAGES, *CAPTIONS)), member)
                for name, member in tar_files(tar)
            )
            files = ((name, stem, kind, member) for name, stem, kind, member in known if kind)
            # A sample's members stand together, and so do ``1.left.jpg`` and ``1.right.jpg``.
            for _, group in itertools.groupby(files, key=lambda file: _before_dot(file[0])):
                yield from _tar_refs(tar, label, list(group))
    except Exception as error:  # whatever a parser of headers or of a compression raises
        yield _left_out(f"{label}.tar", f"damaged tar: {reason(error)}")


def _tar_refs(
    tar: tarfile.TarFile,
    label: str,
    files: list[tuple[str, str, str, tarfile.TarInfo | None]],
) -> Iterator[ImageRef]:
    images: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, tarfile.TarInfo] = {}
    left_out: list[ImageRef] = []
    for name, stem, kind, member in files:
        if kind in CAPTIONS:
            if member is not None:
                captions.setdefault(stem, member)
            continue
        why = None
        if kind in OTHER_IMAGES:
            why = f"images of type {kind} are not read"
        elif member is None:
            why = "a link or a device"
        elif stem in images:
            why = f"the sample {label}/{stem} has another image, {images[stem].name}"
        elif member.size > MAX_FILE_BYTES:
            why = f"file of {member.size} bytes"
        if why is None and member is not None:
            images[stem] = member
        else:
            left_out.append(_left_out(f"{label}/{name}", why or ""))
    for stem, member in images.items():
        text = captions.get(stem)
        caption = "" if text is None else decode_caption(_read(tar, text, MAX_CAPTION_BYTES))
        key = f"{label}/{stem}"
        yield ImageRef(key, caption, key, _read(tar, member, MAX_FILE_BYTES))
    yield from left_out


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    file = tar.extractfile(member)
    data = file.read(most) if file else b""
    if len(data) < min(member.size, most):
        raise EOFError(f"{member.name} breaks off")
    return data


def _before_dot(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"
