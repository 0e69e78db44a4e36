"""How kernels are launched: views without copies, block sizes, warps, and rows a program.

The arithmetic is for an H100: 132 multiprocessors with 64 warps and 65,536 registers each, 3.0 TB/s
measured, about 0.7 us from request to data. So each multiprocessor must have
3.0 TB/s * 0.7 us / 132 = 16 KB of loads in flight.

* In a row of a 16-bit dtype each thread has 8 columns, one 16-byte load. ``num_warps`` is therefore
  ``block / 256``.
* A forward row kernel of 4 warps takes 40 to 60 registers a thread. At least 8 programs fit on a
  multiprocessor, with 8 * 4 * 32 * 16 B = 16 KB in flight for one input, 32 KB for the two of a
  join.
* A backward kernel keeps parameters and three sums a column in registers, 130 to 170 a thread. 3
  programs fit, and its four inputs have 3 * 4 * 32 * 16 B * 4 = 24 KB in flight.
* Each forward program reads up to four rows of parameters, more than its own row. Once there are
  16 programs for each multiprocessor (2,112 in all), a program therefore walks several rows.
* A backward program writes partial sums: three fp32 rows, which are read again. If it walks 32
  rows, these cost 24 B for each 32 * 6 B of a 16-bit column, an eighth of the traffic. It walks 4
  to 32 rows, so that there are 512 programs or more where the rows suffice.

``num_warps`` and the block depend on the width only. So the result of a row does not depend on the
other rows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.typed import cdiv, next_power_of_2

MAX_WIDTH = 8192
"""The widest row that one program holds: 16 columns a thread at 16 warps of 128 registers."""

MAX_WARPS = 16
REGISTERS = 65536

ELEMENTWISE_COLUMNS = 1024
ELEMENTWISE_ELEMENTS = 2048
"""The tile of an elementwise kernel: 16 elements a thread at 4 warps, two 16-byte loads each."""

FORWARD_PROGRAMS = 2112
FORWARD_ROWS = 8
BACKWARD_PROGRAMS = 512
BACKWARD_ROWS = (4, 32)


class RowLaunch(NamedTuple):
    """The columns of a program (a power of two), its warps, and the number of rows it walks."""

    block: int
    num_warps: int
    rows: int


class ElementwiseLaunch(NamedTuple):
    """Rows and columns of a program's tile, and the grid."""

    rows: int
    columns: int
    grid: tuple[int]


def forward_launch(width: int, rows: int) -> RowLaunch:
    """The launch of a kernel that maps each of ``rows`` rows of ``width`` columns by itself."""
    block = row_block(width)
    walked = _power_of_two_below(min(FORWARD_ROWS, rows // FORWARD_PROGRAMS))
    return RowLaunch(block, _warps(block), walked)


def backward_launch(width: int, rows: int) -> RowLaunch:
    """The launch of a kernel that also sums over rows: fewer programs with more rows each."""
    block = row_block(width)
    least, most = BACKWARD_ROWS
    walked = _power_of_two_below(min(most, max(least, rows // BACKWARD_PROGRAMS)))
    return RowLaunch(block, _warps(block), walked)


def register_limit(launch: RowLaunch, programs: int) -> int:
    """The most registers a thread with which ``programs`` programs of 4 warps fit at once.

    Wider programs count by their threads. Threads of the widest rows hold more than 8 columns and
    get more registers in proportion.
    """
    columns = max(8, launch.block // (32 * launch.num_warps))
    warps = max(4 * programs * 8 // columns, launch.num_warps)
    return min(255, REGISTERS // (32 * warps) // 8 * 8)


def row_block(width: int) -> int:
    """The power of two that holds a row.

    Raises:
        ValueError: for an empty row, or one wider than ``MAX_WIDTH``.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"impl=TRITON: expected a width from 1 to {MAX_WIDTH}, what one program holds, "
            f"got {width}; pass impl=Impl.REFERENCE"
        )
    return next_power_of_2(width)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of ``x`` the current one; nothing in the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def elementwise_launch(rows: int, width: int) -> ElementwiseLaunch:
    """Tile and grid of an elementwise kernel. The grid has one axis: the others end at 65,535."""
    most = ELEMENTWISE_ELEMENTS if rows == 1 else ELEMENTWISE_COLUMNS
    columns = min(next_power_of_2(width), most)
    tile_rows = min(next_power_of_2(rows), ELEMENTWISE_ELEMENTS // columns)
    grid = cdiv(rows, tile_rows) * cdiv(width, columns)
    return ElementwiseLaunch(tile_rows, columns, (grid,))


def whole_rows_launch(rows: int, width: int) -> tuple[ElementwiseLaunch, int]:
    """Tile, grid and warps of an elementwise kernel whose tiles hold whole rows.

    Up to 2,048 columns the tile is that of ``elementwise_launch``, with 4 warps. Wider rows have
    more warps, again with 16 elements a thread.
    """
    columns = row_block(width)
    tile_rows = min(next_power_of_2(rows), max(1, ELEMENTWISE_ELEMENTS // columns))
    num_warps = max(4, min(MAX_WARPS, columns // 512))
    return ElementwiseLaunch(tile_rows, columns, (cdiv(rows, tile_rows),)), num_warps


def batched_rows(x: Tensor) -> Tensor:
    """``x`` as ``[B, N, W]``. A copy only where more than three axes do not merge into a view."""
    if x.dim() > 3:
        return x.flatten(0, -3)
    return x[(None,) * (3 - x.dim())]


def unit_stride(x: Tensor) -> Tensor:
    """``x``, or a copy if its columns are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def merged(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape as ``[B, N, W]``, or as a single long row if all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return tuple(x.view(1, 1, -1) for x in tensors)
    return tuple(batched_rows(x) for x in tensors)


def merged_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[B, N, W]`` tensors as one sample of B N tokens, where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return tuple(x.view(1, -1, x.shape[-1]) if x.numel() else x for x in tensors)
    return tensors


def accumulator(*tensors: Tensor | None) -> tl.dtype:
    """The dtype to compute in: fp32, or fp64 where an input is."""
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return tl.float64 if wide else tl.float32


def torch_accumulator(acc: tl.dtype) -> torch.dtype:
    """The torch dtype of ``acc``."""
    return torch.float64 if acc == tl.float64 else torch.float32


def _warps(block: int) -> int:
    return max(1, min(MAX_WARPS, block // 256))


def _power_of_two_below(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
