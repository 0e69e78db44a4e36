"""Index arithmetic of kernels over strided ``[B, N, W]`` tensors.

Tensors are not copied first: batch, token and column strides are arguments. Triton makes a stride
of 1 a constant, so contiguous rows keep their 16-byte accesses. Offsets are int64.
"""

import triton.language as tl

from blip3o_kernels.typed import jit


@jit
def tile(rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row ``[ROWS, 1]`` and column ``[1, COLS]`` indices of this program, and which are inside."""
    blocks = tl.cdiv(width, COLS)
    program = tl.program_id(0)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)
    col = (program % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    row, col = row[:, None], col[None, :]
    return row, col, (row < rows) & (col < width)


@jit
def offsets(row, col, tokens, stride_b, stride_n, stride_d):
    """Offsets of the elements of a tile. ``row`` counts the tokens of all samples."""
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)
    return batch * stride_b + token * stride_n + col.to(tl.int64) * stride_d


@jit
def load_tile(base, row, col, tokens, stride_b, stride_n, stride_d, inside, ACC: tl.constexpr):
    """A tile of a strided tensor, in ``ACC``; elements outside are 0."""
    source = base + offsets(row, col, tokens, stride_b, stride_n, stride_d)
    return tl.load(source, mask=inside, other=0.0).to(ACC)


@jit
def token_range(tokens, rows, chunks):
    """The sample of this program, and the first and last token that it walks."""
    program = tl.program_id(0)
    first = (program % chunks) * rows
    return (program // chunks).to(tl.int64), first, tl.minimum(first + rows, tokens)


@jit
def load_row(base, token, cols, stride_n, stride_d, inside, ACC: tl.constexpr):
    """One row of one sample, in ``ACC``; columns outside the width are 0."""
    offset = tl.cast(token, tl.int64) * stride_n + cols.to(tl.int64) * stride_d
    return tl.load(base + offset, mask=inside, other=0.0).to(ACC)


@jit
def load_vector(base, cols, inside, ACC: tl.constexpr):
    """A contiguous parameter row, in ``ACC``; columns outside the width are 0."""
    return tl.load(base + cols, mask=inside, other=0.0).to(ACC)
