"""Sums in a fixed order, without atomics: every run gives equal bits.

A sum over rows has two stages. Each program of a backward kernel adds its rows in order and writes
partial sums. A second kernel adds those of all programs. Its programs have few columns and many
rows each, so that they cover the GPU, and that most of them read only once before they add.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.launch import on_device
from blip3o_kernels.typed import cdiv, jit

STAGE_ROWS = 256
STAGE_COLUMNS = 32
STAGE_WARPS = 8
"""Partial sums that a program of the second stage reads at a time: 32 KB."""


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
    first,
    second,
    count,
    padded,
    width,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = tl.cdiv(width, COLS)
    which = program // blocks
    cols = (program % blocks) * COLS + tl.arange(0, COLS)
    inside = cols < width
    base = partial + which * padded
    total = column_sums(base, cols, inside, count, SUMS * padded, ROWS, COLS, ACC)
    if SUMS == 1 or which == 0:
        tl.store(first + cols, total.to(first.dtype.element_ty), mask=inside)
    else:
        tl.store(second + cols, total.to(second.dtype.element_ty), mask=inside)


def column_sum(partial: Tensor, out: tuple[Tensor, ...], accumulator: tl.dtype) -> None:
    """``out[i][:] = partial[:, i, :width].sum(0)`` for one or two ``out`` of equal width.

    ``partial`` is ``[count, len(out), padded]``, contiguous.
    """
    count, sums, padded = partial.shape
    width = out[0].shape[0]
    with on_device(partial):
        _column_sum_stage[(sums * cdiv(width, STAGE_COLUMNS),)](
            partial,
            out[0],
            out[-1],
            count,
            padded,
            width,
            SUMS=sums,
            ROWS=STAGE_ROWS,
            COLS=STAGE_COLUMNS,
            ACC=accumulator,
            num_warps=STAGE_WARPS,
            enable_fp_fusion=False,
        )
