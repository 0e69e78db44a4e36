"""How kernels are launched: views without copies, block sizes, warps, rows a program walks.

The arithmetic behind the table, for an H100 (132 multiprocessors, 64 warps and 65,536 registers
each, 3.0 TB/s measured, about 0.7 us from request to data): 3.0 TB/s * 0.7 us / 132 = 16 KB must be
in flight on a multiprocessor.

* A row of a 16-bit dtype gives each thread 8 columns, one 16-byte load: ``num_warps`` is
  ``block / 256``. A forward row kernel of 4 warps takes 40 to 60 registers a thread, so at least 8
  programs are resident and 8 * 4 * 32 * 16 B = 16 KB are in flight for one input, 32 KB for the two
  of a join.
* A backward kernel keeps parameters and three sums a column in registers, 130 to 170 a thread, so 3
  programs are resident; its four inputs still put 3 * 4 * 32 * 16 B * 4 = 24 KB in flight.
* A forward program walks several rows once there are rows enough to fill the card 16 programs deep
  (2,112), because each program reads up to four parameter rows, more than its own row.
* A backward program walks up to 32 rows: its partial sums, three fp32 rows written and read again,
  then cost 24 B per 32 * 6 B of a 16-bit column, an eighth of the traffic. At least 4 rows and at
  most 512 to 1,024 programs otherwise.

``num_warps`` and the block depend on the width alone, so a row's result does not depend on how many
rows come with it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.typed import cdiv, next_power_of_2

MAX_WIDTH = 8192
"""Widest row that one program holds: 16 columns a thread at 16 warps, 128 registers each."""

MAX_WARPS = 16
REGISTERS = 65536

ELEMENTWISE_COLUMNS = 1024
ELEMENTWISE_ELEMENTS = 2048
"""A tile of an elementwise kernel: 16 elements a thread at 4 warps, two 16-byte loads an input."""

FORWARD_PROGRAMS = 2112
FORWARD_ROWS = 8
BACKWARD_PROGRAMS = 512
BACKWARD_ROWS = (4, 32)


class RowLaunch(NamedTuple):
    """Columns held by a program (a power of two), its warps, and the rows that it walks."""

    block: int
    num_warps: int
    rows: int


class ElementwiseLaunch(NamedTuple):
    """Rows and columns of a program's tile, and the grid that covers everything."""

    rows: int
    columns: int
    grid: tuple[int]


def forward_launch(width: int, rows: int) -> RowLaunch:
    """Launch of a kernel that maps ``rows`` rows of ``width`` columns one by one."""
    block = row_block(width)
    walked = _power_of_two_below(min(FORWARD_ROWS, rows // FORWARD_PROGRAMS))
    return RowLaunch(block, _warps(block), walked)


def backward_launch(width: int, rows: int) -> RowLaunch:
    """Launch of a kernel that also sums over rows: fewer, longer programs."""
    block = row_block(width)
    least, most = BACKWARD_ROWS
    walked = _power_of_two_below(min(most, max(least, rows // BACKWARD_PROGRAMS)))
    return RowLaunch(block, _warps(block), walked)


def register_limit(launch: RowLaunch, programs: int) -> int:
    """Registers a thread that let ``programs`` programs of 4 warps, or as many threads, reside.

    A thread of the widest rows holds more than 8 columns, and gets registers in proportion.
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
    """Launch on the device of ``x``; in the interpreter there is none to choose."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def elementwise_launch(rows: int, width: int) -> ElementwiseLaunch:
    """Tile and grid of a kernel that maps elements, in one grid axis: the others end at 65,535."""
    most = ELEMENTWISE_ELEMENTS if rows == 1 else ELEMENTWISE_COLUMNS
    columns = min(next_power_of_2(width), most)
    tile_rows = min(next_power_of_2(rows), ELEMENTWISE_ELEMENTS // columns)
    grid = cdiv(rows, tile_rows) * cdiv(width, columns)
    return ElementwiseLaunch(tile_rows, columns, (grid,))


def whole_rows_launch(rows: int, width: int) -> tuple[ElementwiseLaunch, int]:
    """Tile, grid and warps of an elementwise kernel whose tiles hold whole rows.

    Up to 2,048 columns a tile is that of ``elementwise_launch``, of 4 warps; a wider row has as
    many elements a thread, 16.
    """
    columns = row_block(width)
    tile_rows = min(next_power_of_2(rows), max(1, ELEMENTWISE_ELEMENTS // columns))
    num_warps = max(4, min(MAX_WARPS, columns // 512))
    return ElementwiseLaunch(tile_rows, columns, (cdiv(rows, tile_rows),)), num_warps


def batched_rows(x: Tensor) -> Tensor:
    """``x`` as ``[B, N, W]``; a view unless more than three axes cannot be merged in place."""
    if x.dim() > 3:
        return x.flatten(0, -3)
    return x[(None,) * (3 - x.dim())]


def unit_stride(x: Tensor) -> Tensor:
    """A parameter with contiguous columns: itself, or a small copy."""
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
    """The same for memory that holds sums."""
    return torch.float64 if acc == tl.float64 else torch.float32


def _warps(block: int) -> int:
    return max(1, min(MAX_WARPS, block // 256))


def _power_of_two_below(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
