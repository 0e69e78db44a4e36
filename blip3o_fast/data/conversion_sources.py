"""What a conversion reads: embeddings in some other format, row by row."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.data.diskarray import DiskArray
from blip3o_fast.data.manifest import Encoder
from blip3o_fast.data.sidecar import SampleRecord, decode_record
from blip3o_fast.untrusted import one_line, reason

_LONGEST_HEADER = 1 << 16  # bytes of a .npy file before its elements


class TokenRows(Protocol):
    """Embeddings ``[n, T, width]`` that can be read some rows at a time; a ``DiskArray`` can."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes (n, T, width)."""
        ...

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type of ``rows``."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        ...


@dataclass(frozen=True)
class Source:
    """One file or pair of files to convert.

    Attributes:
        name: file name, for messages.
        records: key, caption and photo of each sample; their number is n.
        eva, clip: embeddings, at least one of the two; n rows of the same number of tokens.
        has_cls: whether token 0 is a CLS token; None where the file does not say.
        eva_encoder, clip_encoder: origin, where it is known.
        same_key_same_image: a repeated key means the same image, which is skipped. Otherwise it
            means another image, which gets another key.
        remarks: what is odd about the file, one line each.
    """

    name: str
    records: Sequence[SampleRecord]
    eva: TokenRows | None
    clip: TokenRows | None
    has_cls: bool | None = None
    eva_encoder: Encoder | None = None
    clip_encoder: Encoder | None = None
    same_key_same_image: bool = False
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shapes = [rows.shape for rows in (self.eva, self.clip) if rows is not None]
        same = {shape[:2] for shape in shapes}
        if any(len(shape) != 3 for shape in shapes) or len(same) != 1:
            raise ValueError(
                f"{self.name}: expected eva [n, T, E] and clip [n, T, C], got "
                + " and ".join(str(list(shape)) for shape in shapes)
            )
        samples = shapes[0][0]
        if samples != len(self.records) or 0 in shapes[0]:
            raise ValueError(
                f"{self.name}: expected samples, one record each, got {list(shapes[0])} and "
                f"{len(self.records)} records"
            )
        assert self.dtypes  # finding them refuses what is not floating point

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Element types of the towers.

        Raises:
            ValueError: unless they are floating-point types.
        """
        return {rows.torch_dtype for rows in (self.eva, self.clip) if rows is not None}

    @property
    def tokens(self) -> int:
        """Tokens T of a sample."""
        rows = self.eva or self.clip
        assert rows is not None
        return rows.shape[1]


@dataclass(frozen=True)
class StackedRows:
    """One two-dimensional array on disk for each sample, all of one shape and type."""

    arrays: Sequence[DiskArray]

    def __post_init__(self) -> None:
        first = self.arrays[0]
        for i, array in enumerate(self.arrays):
            if (array.shape, array.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{array.path.name}: sample {i}: expected {list(first.shape)} of "
                    f"{first.dtype}, got {list(array.shape)} of {array.dtype}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes (n, T, width)."""
        return (len(self.arrays), *self.arrays[0].shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type."""
        return self.arrays[0].torch_dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, read from disk."""
        arrays = self.arrays[start:stop]
        return torch.stack([array.rows(0, array.shape[0]) for array in arrays])


@dataclass(frozen=True)
class TensorRows:
    """A tensor in memory, for embeddings that a pickle stores as nested lists of numbers."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes (n, T, width)."""
        return tuple(self.tensor.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type."""
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        return self.tensor[start:stop]


def npy_source(folder: Path) -> Source:
    """``eva.npy`` and ``clip.npy`` of a folder, either alone or both, ``[n, T, width]`` each.

    An optional ``records.jsonl`` has one line per row, ``{"key": ..., "caption": ...,
    "source": ...}``.
    """
    rows = {name: _npy_rows(folder / f"{name}.npy") for name in ("eva", "clip")}
    present = next(r for r in rows.values() if r is not None)
    path = folder / "records.jsonl"
    if path.is_file():
        lines = path.read_bytes().splitlines()
        records = [decode_record(line, f"{path.name}, row {i}") for i, line in enumerate(lines)]
    else:
        records = [SampleRecord(f"row_{i:08d}") for i in range(present.shape[0])]
    return Source(folder.name, records, rows["eva"], rows["clip"])


def npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is column-major, and type of a .npy array; leaves ``file`` at its elements.

    Raises:
        ValueError: beginning with ``where``, if it is no such array.
    """
    start = file.tell()
    head = io.BytesIO(file.read(_LONGEST_HEADER))
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran, dtype = readers[np.lib.format.read_magic(head)](head)
        if any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"shape {one_line(str(shape))}")
    except Exception as error:  # the header is Python source, and its parser raises many kinds
        raise ValueError(f"{where}: expected a .npy array ({reason(error)})") from None
    file.seek(start + head.tell())
    return shape, fortran, dtype


def _npy_rows(path: Path) -> TokenRows | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        shape, fortran, dtype = npy_header(file, path.name)
        offset = file.tell()
    array = DiskArray(path, dtype.str, shape, (), offset)
    assert array.torch_dtype  # finding it refuses what is not floating point
    if len(shape) != 3:
        raise ValueError(f"{path.name}: expected an array [n, T, width], got {list(shape)}")
    needed, held = math.prod(shape) * array.itemsize, path.stat().st_size - offset
    if needed > held:
        raise ValueError(f"{path.name}: truncated: expected {needed} bytes of elements, got {held}")
    n, tokens, width = shape
    array.strides = (1, n, n * tokens) if fortran else (tokens * width, width, 1)
    return array
