"""Tars, which are not trusted, and tars of arrays in webdataset's layout.

``photo_17.eva.npy`` and ``photo_17.clip.npy`` hold ``[T, width]`` each, ``photo_17.txt`` (or
``.caption``, ``.text``) its caption, in any case. The name of a sample may hold dots: what follows
it is the longest suffix that is known. Members are read in place from the uncompressed tar; nothing
is unpacked, so member names cannot write outside a folder.
"""

import codecs
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from blip3o_fast.data.conversion_sources import Source, StackedRows, npy_header
from blip3o_fast.data.diskarray import DiskArray
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.untrusted import reading

CAPTIONS = ("txt", "caption", "text")
_ARRAYS = ("eva.npy", "clip.npy")
_LONGEST_CAPTION = 1 << 20  # bytes
_LONGEST_EXTENSION = 1 << 20  # bytes of a header that extends the next one
_LONGEST_CHAIN = 8  # such headers in a row
_EXTENSIONS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


def open_tar(path: Path, mode: str) -> tarfile.TarFile:
    """``tarfile.open`` with headers that are bounded before anything follows them."""

    chain = 0

    class Header(tarfile.TarInfo):
        # Every header passes here before tarfile reads what follows it; ``frombuf``, which is
        # public, is passed by only in some versions of Python.
        def _proc_member(self, tar: tarfile.TarFile) -> Any:
            nonlocal chain
            chain = chain + 1 if self.type in _EXTENSIONS else 0
            if chain > _LONGEST_CHAIN:
                raise tarfile.ReadError(f"more than {_LONGEST_CHAIN} headers of one member")
            if chain and not 0 <= self.size <= _LONGEST_EXTENSION:
                raise tarfile.ReadError(f"a header of {self.size} bytes")
            return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue]

    return tarfile.open(path, mode, tarinfo=Header)  # pyright: ignore[reportCallIssue, reportArgumentType]


def tar_files(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo | None]]:
    """Name and data of every member that is no folder, in order; a hard link has what it links to.

    The data are None for what holds none: other links, devices, sparse files. The companions that
    macOS adds (``._photo.jpg``) are left out.

    Raises:
        tarfile.ReadError: for a member of negative size.
        EOFError: if the archive does not end with a block of zeros; tarfile stops silently.
    """
    earlier: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.size < 0 or tar.offset < member.offset_data:
            raise tarfile.ReadError(f"{member.name}: a size of {member.size} bytes")
        if member.isdir() or member.name.rpartition("/")[2].startswith("._"):
            continue
        if member.isreg() and not member.issparse():
            earlier[member.name] = member
        holds = member.linkname if member.islnk() else member.name
        yield member.name, earlier.get(holds)
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("it has no end")


def split_name(name: str, kinds: Iterable[str]) -> tuple[str, str]:
    """A member's sample and which of the ``kinds`` it is; no kind if none follows the last dots."""
    for kind in sorted(kinds, key=len, reverse=True):
        stem = name[: -len(kind) - 1]
        if name.lower().endswith(f".{kind}") and stem and not stem.endswith("/"):
            return stem, kind
    return name, ""


def decode_caption(data: bytes) -> str:
    """Text in UTF-8, UTF-16 or UTF-32 (by byte order mark or zeros), or Windows-1252."""
    marks = (
        *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32")),
        *((codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16")),
        (codecs.BOM_UTF16_BE, "utf-16"),
    )
    found = next((encoding for mark, encoding in marks if data.startswith(mark)), None)
    if found is None and 0 in data[:2]:
        found = "utf-16-be" if data[0] == 0 else "utf-16-le"
    if found is None:
        try:
            codecs.getincrementaldecoder("utf-8")().decode(data)  # may break off in a character
            found = "utf-8"
        except UnicodeDecodeError:
            found = "cp1252"
    return data.decode(found, "replace").strip()


def tar_source(path: Path) -> Source:
    """The samples of one tar.

    Raises:
        ValueError: if it is compressed or corrupted, holds no arrays, or lacks one of a pair.
    """
    with reading(path, "an uncompressed, complete tar file"):
        return _tar_source(path)


def _tar_source(path: Path) -> Source:
    arrays: dict[str, dict[str, DiskArray]] = {"eva": {}, "clip": {}}
    captions: dict[str, str] = {}
    for key, kind, member, data in _members(path):
        if kind in _ARRAYS:
            array = _npy_member(path, member, data)
            if arrays[kind[:-4]].setdefault(key, array) is not array:
                raise ValueError(f"{path.name}: {key}.{kind} is there twice")
        elif member.size <= _LONGEST_CAPTION:
            captions.setdefault(key, decode_caption(data.read()))
    keys = list(arrays["eva"] or arrays["clip"])
    if not keys:
        raise ValueError(f"{path.name}: expected members KEY.eva.npy and KEY.clip.npy, got none")
    unpaired = set(arrays["eva"]) ^ set(arrays["clip"])
    if unpaired and arrays["eva"] and arrays["clip"]:
        raise ValueError(f"{path.name}: {min(unpaired)!r}: expected both eva.npy and clip.npy")
    rows = {
        tower: StackedRows([found[key] for key in keys]) if found else None
        for tower, found in arrays.items()
    }
    records = [SampleRecord(key, captions.get(key, "")) for key in keys]
    return Source(path.name, records, rows["eva"], rows["clip"])


def _members(path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, IO[bytes]]]:
    size = path.stat().st_size
    with open_tar(path, "r:") as tar:
        for name, member in tar_files(tar):
            key, kind = split_name(name, (*_ARRAYS, *CAPTIONS))
            if not kind:
                continue
            data = None if member is None else tar.extractfile(member)
            if member is None or data is None:
                raise ValueError(f"{path.name}: {name}: expected a file, got a link or a device")
            if member.offset_data + member.size > size:
                raise ValueError(
                    f"{path.name}: truncated: {name} ends at byte "
                    f"{member.offset_data + member.size}, the file at {size}"
                )
            yield key, kind, member, data


def _npy_member(path: Path, member: tarfile.TarInfo, data: IO[bytes]) -> DiskArray:
    where = f"{path.name}: {member.name}"
    shape, fortran, dtype = npy_header(data, where)
    array = DiskArray(path, dtype.str, shape, (), member.offset_data + data.tell())
    assert array.torch_dtype  # finding it refuses what is not floating point
    if len(shape) != 2 or fortran:
        raise ValueError(f"{where}: expected a row-major array [T, width], got shape {list(shape)}")
    array.strides = (shape[1], 1)
    expected, got = shape[0] * shape[1] * array.itemsize, member.size - data.tell()
    if expected != got:
        raise ValueError(f"{where}: expected {expected} bytes of elements, got {got}")
    return array
