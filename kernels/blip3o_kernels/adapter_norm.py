"""``out = dropout(gelu(layer_norm(x[:W]) * w + b))`` on rows padded to P >= W; the padding is 0.

    xhat = (x - mean) rstd        u = w xhat + b
    out = u Phi(u)                Phi(u) = (1 + erf(u / sqrt 2)) / 2

(arXiv:1607.06450, arXiv:1606.08415, exact form up to the error that ``mills_ratio`` states). Mean
and variance run over the W true columns. Backward, with du = dout (Phi(u) + u phi(u)), g = w du:

    dx = rstd (g - mean(g) - xhat mean(g xhat))        dw = sum du xhat        db = sum du

Forward, per row: reads P elements, writes P. Backward: reads 2 P, writes P, and 2 P fp32 partial
sums per program. Whole rows are read, since a mask that ends at an odd W would split the 16-byte
accesses; the padding is then ignored. Only the inputs are saved. Accumulates in fp32 (fp64 for
fp64).

Dropout is that of ``reference.kept``: bits of a counter, so backward draws them again. A thread has
eight columns of most pieces, which is what one call of the generator serves. With dropout off, the
generated code is unchanged.
"""

# Pyright does not know Triton's loops over constants.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import triton.language as tl
from torch import Tensor

from blip3o_kernels.arithmetic import gelu, gelu_slope
from blip3o_kernels.launch import (
    accumulator,
    blank,
    merged_rows,
    on_device,
    torch_accumulator,
    unit_stride,
    whole_waves,
)
from blip3o_kernels.pieces import (
    dot,
    fetch_rows,
    load_parameter,
    load_rows,
    parameter_piece,
    row_sum,
    row_sums,
    rows_of,
    store_piece,
    store_sum,
    total,
    widened,
    zeros,
)
from blip3o_kernels.reduction import column_sum
from blip3o_kernels.tiles import token_range
from blip3o_kernels.typed import cdiv, jit

COLUMNS = 32
"""Columns of a thread. Many, and parameters read again for each row, leave most rows in flight."""

REGISTERS = 0.4
"""For a column: pieces are read and done with one by one, and only the row stays, in 16 bits."""

BACKWARD_COLUMNS = 16
BACKWARD_REGISTERS = 2.5
"""For a column: two sums and what comes and goes. The two inputs of 16 bits add one."""


@jit
def _without_padding(x, k: tl.constexpr, CUT: tl.constexpr, WIDTH: tl.constexpr):
    """Piece ``k``, 0 outside the true columns."""
    if CUT[k][0] + CUT[k][1] > WIDTH:
        x = tl.where(CUT[k][0] + tl.arange(0, CUT[k][1])[None, :] < WIDTH, x, 0.0)
    return x


@jit
def _after_dropout(h, seed, row, k: tl.constexpr, CUT: tl.constexpr, DROPPED: tl.constexpr):
    """Piece ``k`` of rows with numbers ``row`` ``[ROWS, 1]``, as ``reference.kept`` says."""
    groups: tl.constexpr = CUT[k][1] // 8
    zero = tl.zeros((h.shape[0], groups), tl.uint32)
    group = zero + (CUT[k][0] // 8 + tl.arange(0, groups)).to(tl.uint32)[None, :]
    row = zero + row.to(tl.uint32)
    a, b, c, d = tl.philox(seed, group, row, zero, zero, n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    # The low and the high half of a word, each above 16 bits that decide nothing.
    bits = tl.reshape(tl.join(words << 16, words), h.shape).to(tl.int32, bitcast=True)
    kept = bits >= (DROPPED - 32768) * 65536
    return tl.where(kept, h * (65536 / (65536 - DROPPED)), 0.0)


@jit
def _mean_and_rstd(x, CUT: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """Of rows, over the true columns."""
    true = ()
    for k in tl.static_range(len(CUT)):
        true += (_without_padding(x[k], k, CUT, WIDTH),)
    mean = row_sum(total(true)) * (1.0 / WIDTH)
    centred = ()
    for k in tl.static_range(len(CUT)):
        centred += (_without_padding(x[k] - mean, k, CUT, WIDTH),)
    return mean, tl.rsqrt(row_sum(dot(centred, centred)) * (1.0 / WIDTH) + EPS)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _forward_kernel(
    x,
    weight,
    bias,
    seed,
    out,
    tokens,
    rows,
    chunks,
    x_b,
    x_n,
    x_d,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    if DROPPED:
        seed = tl.load(seed)
    for token in range(first, last, ROWS):
        row, inside = rows_of(token, last, ROWS)
        values = load_rows(x + sample * x_b, row * x_n, x_d, inside, CUT, PADDED, ACC)
        mean, rstd = _mean_and_rstd(values, CUT, EPS, WIDTH)
        target = (sample * tokens + row) * PADDED
        for k in tl.static_range(len(CUT)):
            xhat = _without_padding((values[k] - mean) * rstd, k, CUT, WIDTH)
            w = parameter_piece(weight, k, CUT, WIDTH, ROWS, ACC, True)
            u = tl.fma(xhat, w, parameter_piece(bias, k, CUT, WIDTH, ROWS, ACC, True))
            h = gelu(u, out.dtype.element_ty.primitive_bitwidth <= 16)
            if DROPPED:
                h = _after_dropout(h, seed, sample * tokens + row, k, CUT, DROPPED)
            store_piece(out, target, h, inside, k, CUT, PADDED)


@jit(do_not_specialize=["tokens", "rows", "chunks"])
def _backward_kernel(
    dout,
    x,
    weight,
    bias,
    seed,
    dx,
    partial,
    tokens,
    rows,
    chunks,
    dout_b,
    dout_n,
    dout_d,
    x_b,
    x_n,
    x_d,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    DROPPED: tl.constexpr,
    CUT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
    AHEAD: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    sample, first, last = token_range(tokens, rows, chunks)
    up, source = dout + sample * dout_b, x + sample * x_b
    HALF: tl.constexpr = dx.dtype.element_ty.primitive_bitwidth == 16
    w = load_parameter(weight, CUT, WIDTH, ROWS, weight.dtype.element_ty)
    b = load_parameter(bias, CUT, WIDTH, ROWS, bias.dtype.element_ty)
    dw = zeros(CUT, ROWS, ACC)
    db = zeros(CUT, ROWS, ACC)
    if AHEAD:
        row, inside = rows_of(first, last, ROWS)
        next_g = fetch_rows(up, row * dout_n, dout_d, inside, CUT, PADDED)
        next_v = fetch_rows(source, row * x_n, x_d, inside, CUT, PADDED)
    for token in range(first, last, ROWS):
        now, present = rows_of(token, last, ROWS)
        if AHEAD:
            upstream, values = widened(next_g, ACC), widened(next_v, ACC)
            # The next rows are on their way while these are computed.
            row, inside = rows_of(token + ROWS, last, ROWS)
            next_v = fetch_rows(source, row * x_n, x_d, inside, CUT, PADDED)
            if not PARAMETERS:
                next_g = fetch_rows(up, row * dout_n, dout_d, inside, CUT, PADDED)
        else:
            upstream = load_rows(up, now * dout_n, dout_d, present, CUT, PADDED, ACC)
            values = load_rows(source, now * x_n, x_d, present, CUT, PADDED, ACC)
        number = sample * tokens + now
        if DROPPED:
            # Here, where fewer registers are in use than beside the slope of the GELU. The seed is
            # read for each row, so that no register holds what follows from it meanwhile.
            key = tl.load(seed)
            left = ()
            for k in tl.static_range(len(CUT)):
                left += (_after_dropout(upstream[k], key, number, k, CUT, DROPPED),)
            upstream = left
        mean, rstd = _mean_and_rstd(values, CUT, EPS, WIDTH)
        xhat = ()
        gradient = ()
        g = ()
        for k in tl.static_range(len(CUT)):
            standard = _without_padding((values[k] - mean) * rstd, k, CUT, WIDTH)
            wide = w[k].to(ACC)
            offset = b[k].to(ACC)
            if DROPPED and not HALF:  # The bits of dropout need registers.
                offset = parameter_piece(bias, k, CUT, WIDTH, ROWS, ACC, True)
            u = tl.fma(standard, wide, offset)
            slope = gelu_slope(u, HALF)
            du = _without_padding(upstream[k], k, CUT, WIDTH) * slope
            xhat += (standard,)
            gradient += (du,)
            g += (wide * du,)
        if AHEAD and PARAMETERS:  # These need the registers that the last ones leave.
            next_g = fetch_rows(up, row * dout_n, dout_d, inside, CUT, PADDED)
        sum_g, sum_gx = row_sums(total(g), dot(g, xhat))
        mean_g, pull = sum_g * (1.0 / WIDTH), -rstd * (sum_gx * (1.0 / WIDTH))
        target = number * PADDED
        new_dw = ()
        new_db = ()
        for k in tl.static_range(len(CUT)):
            d = tl.fma(rstd, tl.fma(w[k].to(ACC), gradient[k], -mean_g), xhat[k] * pull)
            store_piece(dx, target, _without_padding(d, k, CUT, WIDTH), present, k, CUT, PADDED)
            new_dw += (tl.fma(gradient[k], xhat[k], dw[k]),)
            new_db += (db[k] + gradient[k],)
        if PARAMETERS:
            dw, db = new_dw, new_db
    if PARAMETERS:
        sums = partial + tl.program_id(0).to(tl.int64) * (2 * PADDED)
        store_sum(sums, dw, CUT, PADDED)
        store_sum(sums + PADDED, db, CUT, PADDED)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, dropped: int
) -> Tensor:
    """``[B, N, P]`` to ``[B, N, P]``."""
    out = blank(x)
    weight, bias = unit_stride(weight), unit_stride(bias)
    (source,) = merged_rows(x)
    samples, tokens, padded = source.shape
    launch, _ = whole_waves(source, COLUMNS, REGISTERS)
    if not out.numel():
        return out
    chunks = cdiv(tokens, launch.rows)
    with on_device(x):
        _forward_kernel[(samples * chunks,)](
            source,
            weight,
            bias,
            seed,
            out,
            tokens,
            launch.rows,
            chunks,
            *source.stride(),
            EPS=eps,
            WIDTH=weight.shape[0],
            PADDED=padded,
            DROPPED=dropped,
            ACC=accumulator(x, weight, bias),
            **launch.constants,
        )
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropped: int,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and, with ``parameters``, of weight and bias, else empty tensors."""
    dx = blank(x)
    weight, bias = unit_stride(weight), unit_stride(bias)
    upstream, source = merged_rows(dout, x)
    samples, tokens, padded = source.shape
    width = weight.shape[0]
    acc = accumulator(x, weight, bias)
    per_column = BACKWARD_REGISTERS + x.element_size() / 2
    launch, registers = whole_waves(source, BACKWARD_COLUMNS, per_column)
    chunks = cdiv(tokens, launch.rows)
    partial = None
    if parameters:
        partial = x.new_empty((samples * chunks, 2, padded), dtype=torch_accumulator(acc))
    with on_device(x):
        if dx.numel():
            _backward_kernel[(samples * chunks,)](
                upstream,
                source,
                weight,
                bias,
                seed,
                dx,
                partial,
                tokens,
                launch.rows,
                chunks,
                *upstream.stride(),
                *source.stride(),
                EPS=eps,
                WIDTH=width,
                PADDED=padded,
                DROPPED=dropped,
                ACC=acc,
                AHEAD=x.element_size() == 2 and not dropped,
                PARAMETERS=parameters,
                maxnreg=registers,
                **launch.constants,
            )
    if partial is None:
        return dx, x.new_empty(0), x.new_empty(0)
    dw, db = weight.new_empty(width), bias.new_empty(width)
    column_sum(partial, (dw, db), acc)
    return dx, dw, db
