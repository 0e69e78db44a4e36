"""Rows of e4m3 with one fp32 scale each, written by the kernel that computed them.

    scale = max(|x|) / 448        values = e4m3(x * (1 / scale))

in fp32. Both divisions are done once a row and rounded to nearest. GPUs convert to e4m3 from sm_89
on. A row takes 1 byte an element and 4 bytes for the scale, and one more reduction.
"""

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.pieces import store_rows
from blip3o_kernels.typed import jit

E4M3_MAX = tl.constexpr(448.0)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(0x04E00000)
"""448 times the smallest normal number, so that even a row of zeros has a normal scale."""


@jit
def row_scale(x, axis: tl.constexpr):
    """The scales of rows that lie along ``axis``.

    Magnitudes are compared as integers. Their order is the same, and NaN is the largest.
    """
    return _scale(tl.max(_magnitude(x), axis))


@jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@jit
def _scale(largest):
    largest = tl.maximum(largest, SMALLEST)
    return tl.div_rn(largest.to(tl.float32, bitcast=True), E4M3_MAX)


@jit
def quantised(x, scale):
    """``x / scale`` as e4m3. It does not overflow if ``scale`` is that of the row."""
    return (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)


@jit
def store_quantised(values, scales, row, x, inside, CUT: tl.constexpr, WIDTH: tl.constexpr):
    """Write rows in pieces, ``row`` ``[ROWS, 1]`` of ``[rows, WIDTH]``, and their scales.

    Columns past the width are 0.
    """
    columns: tl.constexpr = x[len(x) - 1].shape[1]
    largest = tl.full((row.shape[0], columns), 0, tl.int32)
    for k in tl.static_range(len(x)):
        magnitude = _magnitude(x[k].to(tl.float32))
        if x[k].shape[1] > columns:
            shape = (row.shape[0], columns, x[k].shape[1] // columns)
            magnitude = tl.max(tl.reshape(magnitude, shape), axis=2)
        largest = tl.maximum(largest, magnitude)
    if row.shape[0] == 1:
        scale = _scale(tl.max(largest))
    else:
        scale = _scale(tl.max(largest, axis=1))[:, None]
    divided = ()
    for k in tl.static_range(len(x)):
        divided += (quantised(x[k].to(tl.float32), scale),)
    store_rows(values, row * WIDTH, divided, inside, CUT, WIDTH)
    tl.store(scales + row, scale, mask=inside)


def quantised_like(x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Empty e4m3 rows and scales for the rows of ``x``, of ``width`` columns if it is given."""
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, width or x.shape[-1]), dtype=torch.float8_e4m3fn),
        x.new_empty((*rows, 1), dtype=torch.float32),
    )
