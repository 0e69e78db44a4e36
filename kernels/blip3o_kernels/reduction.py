"""Sums in a fixed order, without atomics: every run gives equal bits.

A sum over rows has two stages. Each program of a backward kernel adds its rows in order and writes
partial sums. A second kernel, with one program for each block of columns, adds the partial sums in
the order of the programs.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import on_device
from blip3o_kernels.typed import cdiv, jit

STAGE_ROWS = 16
STAGE_COLUMNS = 64


@jit
def sum2(a, b):
    """The sums of two vectors in one reduction."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@jit
def column_sums(
    base, cols, inside, count, stride, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):
    """Sums of ``count`` rows that lie ``stride`` apart, over the columns ``cols``."""
    rows = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLS), ACC)
    for first in range(0, count, ROWS):
        row = first + rows
        values = tl.load(
            base + row.to(tl.int64) * stride + cols[None, :],
            mask=(row < count) & inside[None, :],
            other=0.0,
        )
        total += values.to(ACC)
    return tl.sum(total, axis=0)


@jit(do_not_specialize=["count"])
def _column_sum_stage(
    partial,
    out,
    count,
    stride,
    width,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < width
    total = column_sums(partial, cols, inside, count, stride, ROWS, COLS, ACC)
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=inside)


def column_sum(partial: Tensor, out: Tensor, accumulator: tl.dtype) -> None:
    """``out[:] = partial.sum(0)`` for ``[count, width]`` partial sums with contiguous columns."""
    count, width = partial.shape
    with on_device(out):
        _column_sum_stage[(cdiv(width, STAGE_COLUMNS),)](
            partial,
            out,
            count,
            partial.stride(0),
            width,
            ROWS=STAGE_ROWS,
            COLS=STAGE_COLUMNS,
            ACC=accumulator,
            num_warps=4,
            enable_fp_fusion=False,
        )
