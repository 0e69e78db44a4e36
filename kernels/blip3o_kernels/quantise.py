"""Rows of e4m3 with one fp32 scale each, written by the kernel that computed them.

    scale = max(|x|) / 448        values = e4m3(x * (1 / scale))

in fp32, both divisions once a row and rounded to nearest. The conversion exists from sm_89 on. A
row costs 1 byte an element and 4 of scale, and one more reduction round.
"""

import torch
import triton.language as tl
from torch import Tensor

from blip3o_kernels.typed import jit

E4M3_MAX = tl.constexpr(448.0)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(0x04E00000)
"""448 times the smallest normal number: no scale is smaller, not even that of a row of zeros."""


@jit
def row_scale(x, axis: tl.constexpr):
    """The scales of rows that lie along ``axis``.

    Magnitudes are compared as integers: the order is that of the numbers, and NaN is the largest.
    """
    magnitude = x.to(tl.int32, bitcast=True) & MAGNITUDE
    largest = tl.maximum(tl.max(magnitude, axis), SMALLEST)
    return tl.div_rn(largest.to(tl.float32, bitcast=True), E4M3_MAX)


@jit
def quantised(x, scale):
    """``x`` over ``scale`` as e4m3; the quotient of a row's own scale does not overflow."""
    return (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)


@jit
def store_quantised(values, scales, row, x, cols, inside, WIDTH: tl.constexpr):
    """Write the row ``x``, an int64 ``row`` of ``[rows, WIDTH]``, and its scale."""
    x = x.to(tl.float32)
    scale = row_scale(x, 0)
    tl.store(values + row * WIDTH + cols, quantised(x, scale), mask=inside)
    tl.store(scales + row, scale)


def quantised_like(x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Memory for the rows of ``x``, or ``width`` columns of each, in e4m3 and for their scales."""
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, width or x.shape[-1]), dtype=torch.float8_e4m3fn),
        x.new_empty((*rows, 1), dtype=torch.float32),
    )
