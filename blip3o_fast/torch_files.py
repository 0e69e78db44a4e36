"""Files of ``torch.save`` from outside: tensors and plain data, and nothing of them runs."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from blip3o_fast.untrusted import reading


def read_torch_file(file: Path) -> Any:
    """What a file holds, on the CPU, in memory of its own; numbers of numpy become Python's.

    Objects of other kinds become ``Unread`` in a zip archive, which all versions since torch 1.6
    write; older files must hold nothing else.

    Raises:
        ValueError: naming the file, if it is damaged, or holds what torch never reads, such as a
            function of the operating system.
    """
    with reading(file, "a weights-only torch file"):
        others: list[str] = []
        with safe_globals([(NumpyType, "numpy.dtype"), *_NUMPY_SCALARS]):
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    require_room(file, sum(entry.file_size for entry in archive.infolist()))
                others = get_unsafe_globals_in_checkpoint(file)
            with safe_globals([(Unread, name) for name in others]):
                return torch.load(file, map_location="cpu", weights_only=True)


def require_room(file: Path, needed: int) -> None:
    """Raise ``ValueError`` if a file claims more bytes than it has."""
    if needed > (size := file.stat().st_size):
        raise ValueError(f"{file}: expected contents that fit its {size} bytes, it claims {needed}")


class Unread:
    """Stands for an object that was not made."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Ignore it."""


class NumpyType:
    """Stands for ``numpy.dtype`` where a checkpoint holds numbers of numpy's, such as a loss."""

    def __init__(self, code: str, *_: bool) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore what plain numbers do not have."""


def numpy_scalar(kind: NumpyType, data: bytes) -> float | int | bool:
    """Stands for numpy's constructor of a number."""
    if kind.code not in _NUMBERS:
        raise ValueError(f"a numpy number of type {kind.code!r}")
    return struct.unpack(_NUMBERS[kind.code], data)[0]


_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}
_NUMPY_SCALARS = [(numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
