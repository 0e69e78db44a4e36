"""``out = silu(x Wg^T) * (x Wu^T)``: the gate-up product with SwiGLU in its epilogue.

``weight`` packs the rows of Wg and then those of Wu, as ``swiglu`` packs their products. For M rows
of D columns and I columns of the output:

* 4 M D I flops, those of the product alone.
* Reads M D + 2 I D elements, writes M I. The product by itself writes 2 M I, which ``swiglu`` reads
  again: 4 M I elements saved, 256 MiB of bf16 for 16,384 rows of base (I = 2048).
* Inference only: the backward pass needs gate and up, which are never in memory.

Sums and SwiGLU are fp32, rounded once at the end. Product and ``swiglu`` round gate and up to 16
bits between them, so they differ from this kernel by about these two roundings.

A program multiplies tiles of rows with as many columns of the gate as of the up, and walks its
tiles: column by column, since all weights stay in L2 while rows pass. TMA moves tiles, fills with
zeros what lies outside, and writes only what lies inside. Its descriptors are arguments, so a
launch needs no scratch memory. A tile of the weight is one box ``[2, COLS, DEPTH]`` and one
product: with a product for the gate and one for the up, ptxas waits after every wgmma. Loads of the
next tile run during the epilogue, since both loops are one (``flatten``).
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from blip3o_kernels.arithmetic import sigmoid
from blip3o_kernels.launch import multiprocessors, on_device
from blip3o_kernels.typed import cdiv, jit

ALIGNMENT = 16
"""TMA takes addresses and strides that are multiples of this, in bytes."""

DEPTH = 64
"""Columns of x and of the weight in a step: 128 bytes, the widest swizzle."""

MULTIPLY_ADDS = 2048
"""Dense 16-bit multiply-adds of a multiprocessor of an H100 in a clock."""

FROM_L2 = 32
"""Bytes that a multiprocessor gets from L2 in a clock: 7.4 TB/s for all at 1.75 GHz, assumed."""


class Tile(NamedTuple):
    """The output of a program: rows, columns, and how it is computed.

    A step takes ``(rows + 2 columns) 128`` bytes of shared memory, ``stages`` of them and an output
    tile are held. The sums take ``rows 2 columns`` registers of all threads together.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def clocks(self) -> float:
        """Of a step on a multiprocessor, whether it multiplies or waits for L2."""
        multiply = self.rows * 2 * self.columns * DEPTH / MULTIPLY_ADDS
        return max(multiply, (self.rows + 2 * self.columns) * DEPTH * 2 / FROM_L2)


TILES = (Tile(128, 128, 8, 4), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4))
"""1536, 1280 and 768 clocks a step; 224, 176 and 104 KiB of shared memory, of 227."""


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    weight,
    out,
    rows,
    width,
    inner,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across = tl.cdiv(inner, COLS)
    tiles = tl.cdiv(rows, ROWS) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = (tile // across) * ROWS
        col = (tile % across) * COLS
        sums = tl.zeros((ROWS, 2 * COLS), tl.float32)
        for k in tl.range(0, width, DEPTH):
            both = weight.load([0, col, k]).reshape(2 * COLS, DEPTH)
            sums = tl.dot(x.load([row, k]), both.T, sums)
        gate, up = tl.split(sums.reshape(ROWS, 2, COLS).permute(0, 2, 1))
        out.store([row, col], (gate * sigmoid(gate) * up).to(out.dtype))


def forward(x: Tensor, weight: Tensor, tile: int | None = None) -> Tensor:
    """``[B, N, D]`` and ``[2I, D]`` of 16 bits to ``[B, N, I]``; D and I are multiples of 8.

    ``tile`` is an index into ``TILES``; None chooses. Copies what TMA cannot read as it lies.
    """
    inner, width = weight.shape[0] // 2, weight.shape[1]
    out = x.new_empty((*x.shape[:-1], inner))
    if not (x.numel() and weight.numel()):
        return out.zero_()
    rows = _readable(x.reshape(-1, width))
    both = _readable(weight).unflatten(0, (2, inner))
    processors = multiprocessors(x)
    chosen = choose_tile(len(rows), inner, processors) if tile is None else TILES[tile]
    count = cdiv(len(rows), chosen.rows) * cdiv(inner, chosen.columns)
    with on_device(x):
        _forward_kernel[(min(count, processors),)](
            TensorDescriptor.from_tensor(rows, [chosen.rows, DEPTH]),
            TensorDescriptor.from_tensor(both, [2, chosen.columns, DEPTH]),
            TensorDescriptor.from_tensor(out.view(-1, inner), [chosen.rows, chosen.columns]),
            len(rows),
            width,
            inner,
            ROWS=chosen.rows,
            COLS=chosen.columns,
            DEPTH=DEPTH,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )
    return out


def choose_tile(rows: int, inner: int, processors: int) -> Tile:
    """The tile whose busiest multiprocessor has the fewest clocks; of equals the largest."""

    def clocks(tile: Tile) -> float:
        tiles = cdiv(rows, tile.rows) * cdiv(inner, tile.columns)
        return cdiv(tiles, processors) * tile.clocks

    return min(TILES, key=clocks)


def _readable(x: Tensor) -> Tensor:
    """``[M, D]`` that TMA can read: ``x``, or a contiguous copy."""
    step, unit = x.stride()
    aligned = x.data_ptr() % ALIGNMENT == 0 and step * x.itemsize % ALIGNMENT == 0
    fits = unit == 1 and step >= x.shape[1] and aligned
    return x if fits else x.clone(memory_format=torch.contiguous_format)
