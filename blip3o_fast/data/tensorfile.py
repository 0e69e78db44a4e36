"""Safetensors files: headers, bit patterns, and writing row by row.

Layout: an 8-byte little-endian length, that many bytes of JSON header, then the tensors end to end.
The header maps a name to ``{"dtype": "BF16", "shape": [...], "data_offsets": [start, stop]}`` with
offsets from the end of the header (huggingface/safetensors). A header is not trusted: it is checked
against the size of the file before anything is allocated.

Elements are handled as bit patterns, unsigned integers of the element's width, because numpy has no
bfloat16; ``bits`` converts without copying.
"""

import hashlib
import json
import math
import reprlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.atomic import PendingFile, write_error
from blip3o_fast.checked import json_object, parse_json
from blip3o_fast.untrusted import reading

_CODES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LARGEST_HEADER = 100 * 1024 * 1024  # the limit of the safetensors library
_MOST_AXES = 8
_HEADER_BYTES = 512  # length and padded JSON, so that data start at a fixed place
_BLOCK_BYTES = 1 << 24  # moved at once within a file
CHECK_ELEMENTS = 1 << 17
"""Elements copied and checked at once, few enough to stay in the L2 cache in between."""


_BITS = {
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
}
# All exponent bits set. Larger magnitudes, as integers, are infinite or NaN as well.
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


class TensorSpec(NamedTuple):
    """Where one tensor lies: ``start`` and ``stop`` are bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def bits(x: Tensor) -> np.ndarray:
    """The bit patterns of a contiguous CPU tensor, sharing its memory."""
    signed, unsigned = _BITS[x.dtype]
    return x.view(signed).numpy().view(unsigned)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor in numpy's memory, which asks for huge pages.

    Writing to new 4 KiB pages costs more than the copy itself; this makes reading 3x as fast.
    """
    signed, unsigned = _BITS[dtype]
    return torch.from_numpy(np.empty(shape, unsigned)).view(signed).view(dtype)


def is_finite(patterns: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether no bit pattern is a NaN or an infinity of ``dtype``.

    Computes two integer maxima per block. As unsigned integers, negative numbers are the largest
    and grow with their magnitude; as signed integers, positive numbers are. Tens of times faster
    than ``torch.isfinite``.
    """
    infinity, sign = _INFINITY[dtype], 1 << (8 * patterns.itemsize - 1)
    signed = np.dtype(f"i{patterns.itemsize}")
    flat = patterns.reshape(-1)
    for start in range(0, flat.size, CHECK_ELEMENTS):
        block = flat[start : start + CHECK_ELEMENTS]
        if block.max() >= sign + infinity or block.view(signed).max() >= infinity:
            return False
    return True


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names and places of the tensors in a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, has bytes to spare, or contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{path.name}: expected a header within the file's {size} bytes, its length says "
                f"{length}: truncated, or not a safetensors file"
            )
        raw = file.read(length)
    with reading(path, "the header of a safetensors file"):
        header = json_object("header", parse_json(raw))
        header.pop("__metadata__", None)
        specs = {name: _spec(name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, spec in sorted(specs.items(), key=lambda item: item[1].start):
        if spec.start != end:
            raise ValueError(f"{path.name}: {name}: expected to start at {end}, got {spec.start}")
        end = spec.stop
    if end != size:
        raise ValueError(
            f"{path.name}: expected {end} bytes, got {size}: "
            + ("truncated" if size < end else "bytes follow the last tensor")
        )
    return specs


def _spec(name: str, value: object, base: int) -> TensorSpec:
    entry = json_object(name, value)
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets, got {sorted(entry)}")
    if entry["dtype"] not in _CODES:
        raise ValueError(f"{name}: expected dtype {', '.join(_CODES)}, got {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        few = isinstance(numbers, list) and len(numbers) <= _MOST_AXES
        if not few or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name}: expected a list of sizes, got {reprlib.repr(numbers)}")
    dtype = _CODES[entry["dtype"]]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: shape {shape} of {entry['dtype']} does not fill bytes {offsets}")
    return TensorSpec(dtype, tuple(shape), base + offsets[0], base + offsets[1])


class RowWriter:
    """Writes tensors with the same, yet unknown number of rows into a safetensors file.

    Space for ``capacity`` rows of each tensor is left in the (sparse) file; ``commit`` closes the
    gaps. Memory use does not depend on the number of rows.

    Args:
        path: final name; the file appears under it on ``commit``.
        row_shapes: shape of one row of each tensor, in file order.
        dtype: of every tensor.
        capacity: most rows that will be written.
    """

    def __init__(
        self,
        path: Path,
        row_shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        capacity: int,
    ) -> None:
        self.rows = 0
        self.capacity = capacity
        self._shapes = row_shapes
        self._dtype = dtype
        self._pending = PendingFile(path)

    def append(self, rows: dict[str, np.ndarray]) -> None:
        """Write the bit patterns ``[b, ...]`` of ``b`` rows of every tensor."""
        count = len(next(iter(rows.values())))
        assert self.rows + count <= self.capacity
        for name, patterns in rows.items():
            assert patterns.shape[1:] == self._shapes[name] and patterns.flags.c_contiguous
            start = self._start(name, self.capacity) + self.rows * self._row_bytes(name)
            self._pending.write(patterns.reshape(-1).view(np.uint8).data, start)
        self.rows += count

    def commit(self) -> tuple[int, str]:
        """Finish the file; its size in bytes and its SHA-256."""
        try:
            for name in self._shapes:
                self._move(name)
            size = self._start(None, self.rows)
            self._pending.file.truncate(size)
            self._pending.write(self._header(), 0)
            self._pending.file.seek(0)
            digest = hashlib.file_digest(self._pending.file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        except OSError as error:
            self.discard()
            raise write_error(error, self._pending.path) from error
        self._pending.commit()
        return size, digest

    def discard(self) -> None:
        """Delete what was written."""
        self._pending.discard()

    def _row_bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _start(self, name: str | None, rows: int) -> int:
        """Offset of a tensor when all have ``rows`` rows; of the end for None."""
        start = _HEADER_BYTES
        for other in self._shapes:
            if other == name:
                break
            start += rows * self._row_bytes(other)
        return start

    def _move(self, name: str) -> None:
        """Close the gap in front of a tensor. It moves forward in the file, so copying is safe."""
        source, target = self._start(name, self.capacity), self._start(name, self.rows)
        remaining = self.rows * self._row_bytes(name) if source != target else 0
        while remaining:
            self._pending.file.seek(source)
            block = self._pending.file.read(min(remaining, _BLOCK_BYTES))
            self._pending.write(block, target)
            source, target = source + len(block), target + len(block)
            remaining -= len(block)

    def _header(self) -> bytes:
        code = next(code for code, dtype in _CODES.items() if dtype == self._dtype)
        header = {"__metadata__": {"format": "pt"}} | {
            name: {
                "dtype": code,
                "shape": [self.rows, *shape],
                "data_offsets": [
                    self._start(name, self.rows) - _HEADER_BYTES,
                    self._start(name, self.rows)
                    - _HEADER_BYTES
                    + self.rows * self._row_bytes(name),
                ],
            }
            for name, shape in self._shapes.items()
        }
        length = _HEADER_BYTES - 8
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length
        return length.to_bytes(8, "little") + text
