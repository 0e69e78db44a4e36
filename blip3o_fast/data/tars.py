"""Tars of arrays in webdataset's layout: a sample's members share the name up to the first dot.

``photo_17.eva.npy`` and ``photo_17.clip.npy`` hold ``[T, width]`` each, ``photo_17.txt`` (or
``.caption``, ``.text``) its caption. Members are read in place from the uncompressed tar; nothing
is unpacked, so member names cannot write outside a folder.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from blip3o_fast.data.conversion_sources import Source, StackedRows
from blip3o_fast.data.diskarray import DiskArray
from blip3o_fast.data.sidecar import SampleRecord

_CAPTIONS = ("txt", "caption", "text")
_LONGEST_CAPTION = 1 << 20  # bytes


def tar_source(path: Path) -> Source:
    """The samples of one tar.

    Raises:
        ValueError: if it is compressed or corrupted, holds no arrays, or lacks one of a pair.
    """
    arrays: dict[str, dict[str, DiskArray]] = {"eva": {}, "clip": {}}
    captions: dict[str, str] = {}
    try:
        for key, kind, member, data in _members(path):
            if kind in ("eva.npy", "clip.npy"):
                array = _npy_member(path, member, data)
                if arrays[kind[:-4]].setdefault(key, array) is not array:
                    raise ValueError(f"{path.name}: {key}.{kind} is there twice")
            elif kind in _CAPTIONS and member.size <= _LONGEST_CAPTION:
                captions[key] = data.read().decode("utf-8", "replace").strip()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path.name}: expected an uncompressed, complete tar file: {error}"
        ) from error
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
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            data = tar.extractfile(member) if member.isreg() and not member.issparse() else None
            if data is None:
                continue
            if member.offset_data + member.size > size:
                raise ValueError(
                    f"{path.name}: truncated: {member.name} ends at byte "
                    f"{member.offset_data + member.size}, the file at {size}"
                )
            name = PurePosixPath(member.name)
            stem, _, kind = name.name.partition(".")
            yield str(name.with_name(stem)) if stem else name.name, kind, member, data
        require_end(tar)


def require_end(tar: tarfile.TarFile) -> None:
    """Raise unless the archive ends with a block of zeros; tarfile stops silently without one."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise EOFError("it has no end")


def _npy_member(path: Path, member: tarfile.TarInfo, data: IO[bytes]) -> DiskArray:
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    where = f"{path.name}: {member.name}"
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(data)](data)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: expected a .npy array: {error}") from error
    array = DiskArray(path, dtype.str, shape, (), member.offset_data + data.tell())
    assert array.torch_dtype  # finding it refuses what is not floating point
    if len(shape) != 2 or fortran:
        raise ValueError(f"{where}: expected a row-major array [T, width], got shape {list(shape)}")
    array.strides = (shape[1], 1)
    expected, got = shape[0] * shape[1] * array.itemsize, member.size - data.tell()
    if expected != got:
        raise ValueError(f"{where}: expected {expected} bytes of elements, got {got}")
    return array
