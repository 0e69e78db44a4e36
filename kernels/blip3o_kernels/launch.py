"""How kernels are launched: views without copies, tiles, warps, and rows a program.

A row lies in the registers of one warp, or of several where that is too wide. A program has four
warps or more, and walks its rows as many at a time as it has warps for. So rows of up to 1,024
columns are added without a barrier.

* A thread loads 16 bytes of a 16-bit row at a time, or 8 where only that makes all pieces equal and
  lets rows share a program. How many columns it holds at most is a choice of each kernel: few leave
  registers for more programs, many need fewer instructions and exchanges a row.
* Each forward program reads up to four rows of parameters first. It walks so many rows that all
  programs end together, in as few waves as pays.
* A backward program writes partial sums: three fp32 rows for each norm, which are read again. So
  that of a norm is as large as a multiprocessor, and walks as many rows as leave one program for
  each: 128 of 16,384, which costs 3% of the traffic of a norm of 16 bits. It reads rows ahead.

The cut of a row and its threads depend on the width only. So the result of a row does not depend on
the other rows.
"""

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.typed import cdiv, next_power_of_2

MAX_WIDTH = 8192
"""The widest row that one program holds: 16 columns a thread at 16 warps of 128 registers."""

WARP = 32
MAX_WARPS = 16
ROW_WARPS = 4
"""Warps of a program with several rows."""

ELEMENTWISE_COLUMNS = 1024
ELEMENTWISE_ELEMENTS = 2048
"""The tile of an elementwise kernel: 16 elements a thread at 4 warps, two 16-byte loads each."""

BLOCK_PROGRAMS = 512
BLOCK_ROWS = (4, 32)

MULTIPROCESSORS = 132
REGISTERS = 65536
PROGRAM_COST = 16
"""What a program over rows spends on its parameters and sums, in rows."""
SUMMED_WARPS = 8
"""Warps of a program that has a multiprocessor to itself: 255 registers a thread."""
DEEP_WIDTH = 2048
DEEP_COLUMNS = 8


class RowLaunch(NamedTuple):
    """How rows are shared out.

    Attributes:
        cut: first column and size of each piece of a row.
        tile: rows that a program holds at a time; one if the pieces differ in size.
        rows: that it walks, a multiple of ``tile``.
        num_warps: of a program.
    """

    cut: tuple[tuple[int, int], ...]
    tile: int
    rows: int
    num_warps: int

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of a kernel over such rows, and its warps."""
        return {
            "CUT": self.cut,
            "ROWS": self.tile,
            "num_warps": self.num_warps,
            "enable_fp_fusion": False,
        }


class BlockLaunch(NamedTuple):
    """The columns of a program (a power of two), its warps, and the number of rows it walks."""

    block: int
    num_warps: int
    rows: int


class ElementwiseLaunch(NamedTuple):
    """Rows and columns of a program's tile, and the grid."""

    rows: int
    columns: int
    grid: tuple[int]


def whole_waves(x: Tensor, columns: int, registers: float) -> tuple[RowLaunch, int]:
    """The launch of a kernel over ``x`` ``[B, N, D]`` whose programs fill the device, and the
    registers that a thread may have, lest fewer of them fit.

    A thread holds at most ``columns`` of a row, unless the row is too wide for that. ``registers``
    are those that it needs for each of them, besides 60.
    """
    samples, tokens, width = x.shape
    return _whole_waves(width, samples, tokens, multiprocessors(x), columns, registers)


def summed_launch(x: Tensor, columns: int, depth: int) -> tuple[RowLaunch, int]:
    """The launch of a kernel over ``[B, N, D]`` that keeps sums of the tokens, and the rows that a
    thread has at a time.

    Where D is a power of two, a thread has 8 columns of ``depth`` rows, so that it keeps few sums
    for what it reads at a time. Elsewhere it has up to ``columns`` of one row.
    """
    samples, tokens, width = x.shape
    if width == row_block(width) <= DEEP_WIDTH:
        columns = DEEP_COLUMNS
    else:
        depth = 1
    launch = _row_launch(width, columns, SUMMED_WARPS)
    rows = _rows_walked(samples, tokens, launch.tile * depth, multiprocessors(x))
    return launch._replace(rows=rows), depth


@lru_cache(maxsize=1024)
def _whole_waves(
    width: int, samples: int, tokens: int, processors: int, columns: int, registers: float
) -> tuple[RowLaunch, int]:
    launch = _row_launch(width, columns, ROW_WARPS)
    held = sum(size for _, size in launch.cut) * launch.tile / (WARP * launch.num_warps)
    most = REGISTERS // (WARP * launch.num_warps)
    needed = cdiv(int(60 + registers * held), 8) * 8  # they are given out in eights
    programs = max(1, most // needed)
    rows = _rows_walked(samples, tokens, launch.tile, processors * programs)
    return launch._replace(rows=rows), min(255, most // programs // 8 * 8)


@lru_cache(maxsize=1024)
def _rows_walked(samples: int, tokens: int, at_once: int, slots: int) -> int:
    """Rows of a program, so that all programs end soonest in waves of ``slots``."""
    tiles = max(1, cdiv(tokens, at_once))

    def cost(chunks: int) -> int:
        walked = cdiv(tiles, chunks) * at_once
        return cdiv(samples * chunks, slots) * (walked + PROGRAM_COST)

    chunks = min(range(1, min(tiles, slots) + 1), key=cost)
    return cdiv(tiles, chunks) * at_once


def multiprocessors(x: Tensor) -> int:
    """Those of the device of ``x``; those of an H100 where there is none."""
    index = x.get_device()
    return MULTIPROCESSORS if index < 0 else _multiprocessors_of(index)


@lru_cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@lru_cache(maxsize=1024)
def _row_launch(width: int, columns: int, num_warps: int) -> RowLaunch:
    """One tile of rows, by ``num_warps`` warps or by as many as a row needs."""
    row_block(width)
    warps = min(MAX_WARPS, next_power_of_2(cdiv(width, WARP * columns)))
    cut = row_cut(width, warps * WARP)
    if warps < num_warps and len({size for _, size in cut}) > 1 and width % (4 * warps * WARP) == 0:
        cut = tuple((first, 4 * warps * WARP) for first in range(0, width, 4 * warps * WARP))
    equal = len({size for _, size in cut}) == 1
    num_warps = max(num_warps, warps) if equal else warps
    tile = num_warps // warps
    return RowLaunch(cut, tile, tile, num_warps)


def row_cut(width: int, threads: int) -> tuple[tuple[int, int], ...]:
    """Pieces of 8, 4 and 2 columns a thread. The rest is rounded up to one column a thread or more.

    A row that is narrower than that is one piece, of 8 columns at least.
    """
    pieces: list[tuple[int, int]] = []
    first = 0
    for size in (8 * threads, 4 * threads, 2 * threads):
        while width - first >= size:
            pieces.append((first, size))
            first += size
    if first < width:
        rest = next_power_of_2(width - first)
        pieces.append((first, max(threads if pieces else 8, rest)))
    return tuple(pieces)


def block_launch(width: int, rows: int) -> BlockLaunch:
    """The launch of a kernel whose programs hold a row as one block, and sum over their rows."""
    block = row_block(width)
    most = min(BLOCK_ROWS[1], max(BLOCK_ROWS[0], rows // BLOCK_PROGRAMS))
    return BlockLaunch(block, max(1, min(MAX_WARPS, block // 256)), _power_of_two_below(most))


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
    """Make the device of ``x`` the current one; nothing on a CPU, whose number is -1."""
    return torch.cuda.device(x.get_device())


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


def blank(x: Tensor) -> Tensor:
    """Empty memory like ``x``, contiguous: half of what ``x.new_empty(x.shape)`` costs the host."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
    for x in tensors:
        if x is not None and x.dtype is torch.float64:
            return tl.float64
    return tl.float32


def torch_accumulator(acc: tl.dtype) -> torch.dtype:
    """The torch dtype of ``acc``."""
    return torch.float64 if acc is tl.float64 else torch.float32


def _power_of_two_below(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)
