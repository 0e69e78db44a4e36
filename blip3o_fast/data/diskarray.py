"""Tensors and arrays in a pickle, which stay on disk until their rows are read.

A pickle of tensors, numpy arrays and plain data needs eleven names (counting those of numpy 1 and
of numpy 2). Here each stands for a function that records where the elements are, with their type,
shape and strides, and checks this against the file.

A tensor's storage is a file within the file, in the layout that ``torch.save`` wrote before its zip
format: five pickles (magic number, version, system, storage, keys), the number of elements as an
int64, and the elements.
"""

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.data.pickles import Builder, Extent, Global, Stretch, Unread, load_data

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "BFloat16Storage": "bf16",
}
_MOST_AXES = 8
_FLOATS = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "bf16": torch.bfloat16}


class Storage(NamedTuple):
    """The elements behind a tensor: their place in the file, number and type."""

    offset: int
    elements: int
    dtype: str


@dataclass
class DType:
    """A numpy dtype under construction: ``<f4`` and the like."""

    code: str

    def set_state(self, state: Any) -> None:
        """Take the byte order; the rest of a simple dtype's state is constant."""
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"numpy byte order {reprlib.repr(order)}")
        self.code = (">" if order == ">" else "<") + self.code[1:]


@dataclass
class DiskArray:
    """A tensor or array whose elements are on disk.

    Attributes:
        path: file that holds them.
        dtype: a numpy code such as ``<f4``, or ``bf16``.
        shape: sizes.
        strides: elements from one index to the next, along each axis.
        offset: byte of the first element in the file.
    """

    path: Path
    dtype: str = ""
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type of ``rows``.

        Raises:
            ValueError: unless it is a floating-point type.
        """
        code = self.dtype.lstrip("<>")
        if code not in _FLOATS:
            raise ValueError(f"{self.path.name}: expected floating point, got {self.dtype}")
        return _FLOATS[code]

    def set_state(self, state: Any) -> None:
        """Complete ``numpy._core.multiarray._reconstruct``."""
        if self.dtype:
            raise ValueError("a second state for an array")
        _, shape, dtype, fortran, data = state
        if isinstance(dtype, Unread):
            self.dtype = "objects"
            return
        self.place(data, dtype, shape, "F" if fortran else "C")

    def place(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Use the elements in ``data``, in C or Fortran order."""
        if not isinstance(data, Extent) or not isinstance(dtype, DType):
            raise ValueError(f"expected an array of numbers, got {type(data).__name__}")
        if not _are_sizes(shape) or order not in ("C", "F"):
            raise ValueError(f"shape {reprlib.repr(shape)}, order {reprlib.repr(order)}")
        elements, strides = 1, []
        for n in reversed(shape) if order == "C" else shape:
            strides.append(elements)
            elements *= n
        self.dtype, self.shape, self.offset = dtype.code, tuple(shape), data.offset
        self.strides = tuple(reversed(strides) if order == "C" else strides)
        if elements * self.itemsize != data.length:
            raise ValueError(
                f"array {list(shape)} of {dtype.code}: expected {elements * self.itemsize} bytes, "
                f"got {data.length}"
            )

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first axis, read from disk into contiguous memory."""
        shape = (stop - start, *self.shape[1:])
        if 0 in shape:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        code = "<i2" if self.dtype == "bf16" else self.dtype
        span = 1 + sum((n - 1) * step for n, step in zip(shape, self.strides, strict=True))
        begin = self.offset + start * self.strides[0] * self.itemsize
        if span == math.prod(shape):
            flat = np.fromfile(self.path, code, span, offset=begin)
        else:  # other data lies in between, perhaps most of the file: let the system page it
            flat = np.memmap(self.path, code, "r", begin, (span,))
        steps = [step * self.itemsize for step in self.strides]
        rows = np.lib.stride_tricks.as_strided(flat, shape, steps)
        rows = np.ascontiguousarray(rows, np.dtype(code).newbyteorder("="))
        tensor = torch.from_numpy(rows)
        return tensor.view(torch.bfloat16) if self.dtype == "bf16" else tensor

    def grouped(self, count: int) -> "DiskArray":
        """The same elements with the first axis cut into ``count`` equal groups."""
        size = self.shape[0] // count
        assert size * count == self.shape[0]
        shape, strides = (count, size, *self.shape[1:]), (size * self.strides[0], *self.strides)
        return DiskArray(self.path, self.dtype, shape, strides, self.offset)


def read_pickle(path: Path) -> Any:
    """The plain data of a pickle: dicts, lists, tuples, strings, numbers and ``DiskArray``.

    Objects of other kinds inside of it are ``Unread``. No code in it ever runs.

    Raises:
        PickleError: a ``ValueError``, if the file is truncated or malformed, or is no data at all.
    """
    with Stretch(path, 0, path.stat().st_size) as stretch:
        return load_data(stretch, _GLOBALS)


def _are_sizes(numbers: Any) -> bool:
    """Whether these are sizes, few and small enough to be multiplied at no cost."""
    few = isinstance(numbers, tuple) and len(numbers) <= _MOST_AXES
    return few and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def _torch_storage(m: Stretch, identifier: tuple[Any, ...]) -> Storage:
    """("storage", type, key, location, elements, view): its place is known later."""
    tag, kind, _, _, elements, *view = identifier
    if tag != "storage" or any(part is not None for part in view) or type(elements) is not int:
        raise m.refusal(f"the persistent object {reprlib.repr(tag)}")
    if isinstance(kind, Unread):
        raise m.refusal(f"a tensor of another type, {kind}")
    return Storage(0, elements, _STORAGES[kind.name])


def _storage(m: Stretch, arguments: tuple[Any, ...]) -> Storage:
    """``torch.storage._load_from_bytes``: find the elements in the file within the file."""
    (extent,) = arguments
    if not isinstance(extent, Extent):
        raise m.refusal("a storage that is not made of bytes")
    known: dict[Global, Builder | None] = {Global("torch", name): None for name in _STORAGES}
    with Stretch(m.path, extent.offset, extent.offset + extent.length) as inner:
        magic, _, system, storage, keys = (
            load_data(inner, known, _torch_storage) for _ in range(5)
        )
        if magic != _TORCH_MAGIC or not isinstance(storage, Storage) or len(keys) != 1:
            raise m.refusal("a storage in an unknown layout")
        if system.get("little_endian") is not True:
            raise m.error("expected little-endian storages")
        elements = inner.number("q")
        if elements != storage.elements or elements < 0:
            raise m.error(f"storage: expected {storage.elements} elements, got {elements}")
        data = inner.skip(elements * DiskArray(m.path, storage.dtype).itemsize)
    return Storage(data.offset, elements, storage.dtype)


def _tensor(m: Stretch, arguments: tuple[Any, ...]) -> DiskArray:
    """``torch._utils._rebuild_tensor_v2``(storage, offset, size, stride, ...)."""
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise m.refusal("a tensor without a storage")
    if len(size) != len(stride) or not all(map(_are_sizes, ((offset,), size, stride))):
        raise m.error(
            f"malformed tensor: shape {reprlib.repr(size)}, strides {reprlib.repr(stride)}"
        )
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and max(last + 1, math.prod(size)) > storage.elements:
        raise m.error(
            f"tensor {list(size)}, strides {list(stride)}: more than its storage holds, "
            f"{storage.elements} elements"
        )
    array = DiskArray(m.path, storage.dtype, tuple(size), tuple(stride))
    array.offset = storage.offset + offset * array.itemsize
    return array


def _dtype(m: Stretch, arguments: tuple[Any, ...]) -> DType:
    """``numpy.dtype``(code, align, copy): integers, floats, booleans and text; no objects."""
    code = arguments[0]
    if not isinstance(code, str) or code[:1] not in "iufbU" or not code[1:].isdigit():
        raise m.refusal(f"a numpy dtype {reprlib.repr(code)}")
    return DType("<" + code)


def _empty_array(m: Stretch, arguments: tuple[Any, ...]) -> DiskArray:
    """``numpy._core.multiarray._reconstruct``(ndarray, (0,), b"b"): its state follows."""
    if arguments[0] != Global("numpy", "ndarray"):
        raise m.refusal(f"an array of type {reprlib.repr(arguments[0])}")
    return DiskArray(m.path)


def _array_from_buffer(m: Stretch, arguments: tuple[Any, ...]) -> DiskArray:
    """``numpy._core.numeric._frombuffer``(buffer, dtype, shape, order)."""
    data, dtype, shape, order = arguments[:4]
    if len(arguments) > 4 and arguments[4] is not None:
        raise m.refusal("an array with permuted axes")
    array = DiskArray(m.path)
    array.place(data, dtype, shape, order)
    return array


def _scalar(m: Stretch, arguments: tuple[Any, ...]) -> Any:
    """``numpy._core.multiarray.scalar``(dtype, bytes)."""
    dtype, data = arguments
    if not isinstance(dtype, DType) or not isinstance(data, Extent):
        raise m.refusal("a numpy scalar that is not a number")
    if data.length != np.dtype(dtype.code).itemsize:
        raise m.error(f"malformed numpy scalar {dtype.code} of {data.length} bytes")
    return np.fromfile(m.path, dtype.code, 1, offset=data.offset)[0].item()


def _ordered_dict(m: Stretch, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """``collections.OrderedDict``(): the items follow."""
    if arguments:
        raise m.refusal("an OrderedDict with arguments")
    return {}


# None: a name that is allowed as an argument but not called.
_GLOBALS: dict[Global, Builder | None] = {
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch.storage", "_load_from_bytes"): _storage,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("numpy", "dtype"): _dtype,
    Global("numpy", "ndarray"): None,
    Global("numpy.core.multiarray", "_reconstruct"): _empty_array,
    Global("numpy._core.multiarray", "_reconstruct"): _empty_array,
    Global("numpy.core.multiarray", "scalar"): _scalar,
    Global("numpy._core.multiarray", "scalar"): _scalar,
    Global("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    Global("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
}
