"""Rows of e4m3 with one fp32 scale each, written by the kernel that computed them.

    scale = max(|x|) / 448        values = e4m3(x * (1 / scale))

in fp32. Both divisions are done once a row and rounded to nearest. GPUs convert to e4m3 from sm_89
on. A row takes 1 byte an element and 4 bytes for the scale, and one more reduction.
"""

import torch
import triton.language as tl
from torch import Tensor

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
    magnitude = x.to(tl.int32, bitcast=True) & MAGNITUDE
    largest = tl.maximum(tl.max(magnitude, axis), SMALLEST)
    return tl.div_rn(largest.to(tl.float32, bitcast=True), E4M3_MAX)


@jit
def quantised(x, scale):
    """``x / scale`` as e4m3. It does not overflow if ``scale`` is that of the row."""
    return (x * tl.div_rn(1.0, scale)).to(tl.float8e4nv)


@jit
def store_quantised(values, scales, row, x, cols, inside, WIDTH: tl.constexpr):
    """Write the row ``x``, an int64 ``row`` of ``[rows, WIDTH]``, and its scale."""
    x = x.to(tl.float32)
    scale = row_scale(x, 0)
    tl.store(values + row * WIDTH + cols, quantised(x, scale), mask=inside)
    tl.store(scales + row, scale)


def quantised_like(x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Empty e4m3 rows and scales for the rows of ``x``, of ``width`` columns if it is given."""
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, width or x.shape[-1]), dtype=torch.float8_e4m3fn),
        x.new_empty((*rows, 1), dtype=torch.float32),
    )
