"""What a conversion reads: embeddings in some other format, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.data.diskarray import DiskArray
from blip3o_fast.data.manifest import Encoder
from blip3o_fast.data.sidecar import SampleRecord, decode_record


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


def _npy_rows(path: Path) -> TokenRows | None:
    if not path.is_file():
        return None
    try:
        mapped: Any = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path.name}: expected an array of numbers: {error}") from error
    if mapped.ndim != 3:
        raise ValueError(f"{path.name}: expected an array [n, T, width], got {mapped.shape}")
    strides = tuple(step // mapped.itemsize for step in mapped.strides)
    # The map only tells shape and offset. Reading through it would keep the file in memory.
    return DiskArray(path, mapped.dtype.str, mapped.shape, strides, mapped.offset)
