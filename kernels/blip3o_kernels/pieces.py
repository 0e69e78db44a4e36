"""Rows in pieces whose sizes are powers of two, so that no thread is idle at any width.

A tile holds ROWS rows, and THREADS threads hold each of them. Triton wants powers of two, so a row
of 768 is a tuple of three tiles ``[ROWS, 256]``. ``CUT`` lists the first column and the size of
each. Equal pieces are neighbours. A thread has the same columns of every row.
"""

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton.language as tl

from blip3o_kernels.typed import jit


@jit
def rows_of(first, last, ROWS: tl.constexpr):
    """Indices ``[ROWS, 1]`` of the rows of a tile, and which of them are before ``last``.

    A tile of one row is always full: past the end it is the last row again, which needs no mask.
    """
    if ROWS == 1:
        first = tl.minimum(first, last - 1)
        return first.to(tl.int64) + tl.full((1, 1), 0, tl.int64), tl.full((1, 1), True, tl.int1)
    row = first + tl.arange(0, ROWS)[:, None]
    return row.to(tl.int64), row < last


@jit
def deep_rows(first, last, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    """The same ``[DEPTH, ROWS, 1]`` of a tile of which each thread has ``DEPTH`` rows."""
    row = first + tl.arange(0, DEPTH)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    return row.to(tl.int64), row < last


@jit
def load_piece(
    base,
    offset,
    stride_d,
    inside,
    k: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Piece ``k`` of rows that begin at ``offset`` ``[ROWS, 1]``, in ``ACC``; 0 where ``inside`` is
    not, and past the width.

    ``AGAIN`` reads from cache what the program has read before. Its registers are free in between.
    """
    col = CUT[k][0] + tl.arange(0, CUT[k][1])[None, :]
    mask = inside & (col < WIDTH) if CUT[k][0] + CUT[k][1] > WIDTH else inside
    at = base + (offset + col.to(tl.int64) * stride_d)
    if AGAIN:
        # With the same modifier the compiler would keep the values of the first load.
        piece = tl.load(at, mask=mask, other=0.0, cache_modifier=".ca")
    else:
        piece = tl.load(at, mask=mask, other=0.0)
    return piece.to(ACC)


@jit
def load_rows(
    base, offset, stride_d, inside, CUT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr
):
    """All pieces of rows that begin at ``offset`` ``[ROWS, 1]``, in ``ACC``."""
    return widened(fetch_rows(base, offset, stride_d, inside, CUT, WIDTH), ACC)


@jit
def fetch_rows(base, offset, stride_d, inside, CUT: tl.constexpr, WIDTH: tl.constexpr):
    """The same in the dtype of memory."""
    row = ()
    for k in tl.static_range(len(CUT)):
        row += (fetch_piece(base, offset, stride_d, inside, k, CUT, WIDTH),)
    return row


@jit
def fetch_piece(
    base, offset, stride_d, inside, k: tl.constexpr, CUT: tl.constexpr, WIDTH: tl.constexpr
):
    """Piece ``k`` in the dtype of memory: rows that are read ahead take few registers."""
    dtype: tl.constexpr = base.dtype.element_ty
    return load_piece(base, offset, stride_d, inside, k, CUT, WIDTH, dtype, False)


@jit
def widened(row, ACC: tl.constexpr):
    """All pieces in ``ACC``."""
    wide = ()
    for k in tl.static_range(len(row)):
        wide += (row[k].to(ACC),)
    return wide


@jit
def parameter_piece(
    base,
    k: tl.constexpr,
    CUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """Piece ``k`` of a contiguous row of parameters, the same for all rows of a tile."""
    # As high as a tile, so that each thread loads what it needs, 16 bytes at a time.
    zero = tl.full((ROWS, 1), 0, tl.int64)
    return load_piece(base, zero, 1, zero == 0, k, CUT, WIDTH, ACC, AGAIN)


@jit
def load_parameter(
    base, CUT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr
):
    """All pieces of a row of parameters."""
    row = ()
    for k in tl.static_range(len(CUT)):
        row += (parameter_piece(base, k, CUT, WIDTH, ROWS, ACC, False),)
    return row


@jit
def store_piece(
    base, offset, piece, inside, k: tl.constexpr, CUT: tl.constexpr, WIDTH: tl.constexpr
):
    """Write piece ``k`` of contiguous rows that begin at ``offset`` ``[ROWS, 1]``."""
    col = CUT[k][0] + tl.arange(0, CUT[k][1])[None, :]
    mask = inside & (col < WIDTH) if CUT[k][0] + CUT[k][1] > WIDTH else inside
    tl.store(base + (offset + col), piece.to(base.dtype.element_ty), mask=mask)


@jit
def store_rows(base, offset, row, inside, CUT: tl.constexpr, WIDTH: tl.constexpr):
    """Write all pieces."""
    for k in tl.static_range(len(CUT)):
        store_piece(base, offset, row[k], inside, k, CUT, WIDTH)


@jit
def zeros(CUT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Rows of zeros."""
    row = ()
    for k in tl.static_range(len(CUT)):
        row += (tl.full((ROWS, CUT[k][1]), 0.0, ACC),)
    return row


@jit
def times(a, b):
    """``a b``, column by column."""
    product = ()
    for k in tl.static_range(len(a)):
        product += (a[k] * b[k],)
    return product


@jit
def dot(a, b):
    """What is left to add of ``sum(a b)`` of each row: a tile as wide as the last piece."""
    return total(times(a, b))


@jit
def total(a):
    """What is left to add of ``sum(a)`` of each row, as ``dot`` leaves it."""
    run = a[0]
    before = tl.zeros_like(a[len(a) - 1])
    for k in tl.static_range(1, len(a)):
        if a[k].shape[-1] != a[k - 1].shape[-1]:
            before += folded(run, a[len(a) - 1].shape[-1])
            run = a[k]
        else:
            run += a[k]
    return run if a[0].shape[-1] == a[len(a) - 1].shape[-1] else before + run


@jit
def folded(x, COLUMNS: tl.constexpr):
    """Neighbours added, down to ``COLUMNS`` columns; a thread has them already."""
    if len(x.shape) == 3:
        x = tl.reshape(x, (x.shape[0], x.shape[1], COLUMNS, x.shape[2] // COLUMNS))
    else:
        x = tl.reshape(x, (x.shape[0], COLUMNS, x.shape[1] // COLUMNS))
    return tl.sum(x, axis=len(x.shape) - 1)


@jit
def add_products(total, a, b):
    """``total`` ``[ROWS, COLS]`` and the sum of ``a b`` over the rows of each thread."""
    if a.shape[0] == 1:
        shape: tl.constexpr = total.shape
        return tl.fma(tl.reshape(a, shape), tl.reshape(b, shape), total)
    else:
        return total + tl.sum(a * b, axis=0)


@jit
def row_sum(x):
    """The sums ``[ROWS, 1]`` of rows; a scalar for one row."""
    if len(x.shape) == 3:
        return tl.sum(x, axis=2, keep_dims=True)
    elif x.shape[0] == 1:
        return tl.sum(x)
    else:
        return tl.sum(x, axis=1)[:, None]


@jit
def row_sums(x, y):
    """The same of two tiles, in one exchange."""
    # Of one row as scalars, which take fewer registers than tiles of one element.
    if len(x.shape) == 2 and x.shape[0] == 1:
        columns: tl.constexpr = x.shape[1]
        return tl.reduce((tl.reshape(x, (columns,)), tl.reshape(y, (columns,))), 0, add_two)
    else:
        return tl.reduce((x, y), len(x.shape) - 1, add_two, keep_dims=True)


@jit
def add_two(a, b, c, d):
    """Two sums in one reduction."""
    return a + c, b + d


@jit
def add_three(a, b, c, d, e, f):
    """Three sums in one reduction."""
    return a + d, b + e, c + f


@jit
def store_sums(base, p, q, r, CUT: tl.constexpr, WIDTH: tl.constexpr):
    """Add the rows of three tiles, and write the sums as three rows."""
    for k in tl.static_range(len(CUT)):
        col = CUT[k][0] + tl.arange(0, CUT[k][1])
        inside = col < WIDTH
        sums = tl.reduce((p[k], q[k], r[k]), 0, add_three)
        tl.store(base + col, sums[0], mask=inside)
        tl.store(base + WIDTH + col, sums[1], mask=inside)
        tl.store(base + 2 * WIDTH + col, sums[2], mask=inside)


@jit
def store_sum(base, rows, CUT: tl.constexpr, WIDTH: tl.constexpr):
    """Add the rows of a tile, and write their sum."""
    for k in tl.static_range(len(CUT)):
        col = CUT[k][0] + tl.arange(0, CUT[k][1])
        tl.store(base + col, tl.sum(rows[k], axis=0), mask=col < WIDTH)
