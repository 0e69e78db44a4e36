"""``out = c[0] x + c[1] v + sum_r c[2 + r] slopes[r]``: one update of the ODE state.

With guidance the velocity holds the conditional half, then the unconditional half, and
``v = v_uncond + guidance (v_cond - v_uncond)`` (arXiv:2207.12598). The result is clamped to a
bound, if there is one; NaN stays NaN. v replaces row ``slot`` of ``slopes``, if there is one.

Per element: reads x, one or two velocities in their own dtype, and the rows of ``slopes`` whose
coefficient is not zero; writes ``out`` and, if it is kept, v. Computes in the dtype of the state,
fp32 or fp64. Coefficients, slot and bound are in device memory, so they may change between replays
of a CUDA graph. One compiled kernel serves any number of rows.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.arithmetic import joined, split
from blip3o_kernels.launch import accumulator, elementwise_launch, merged, on_device, unit_stride
from blip3o_kernels.tiles import load_tile, tile
from blip3o_kernels.typed import jit


@jit(do_not_specialize=["rows", "tokens", "count"])
def _update_kernel(
    x,
    conditional,
    unconditional,
    slopes,
    coefficients,
    slot,
    clamp,
    out,
    rows,
    tokens,
    width,
    count,
    slopes_r,
    x_b,
    x_n,
    x_d,
    velocity_b,
    velocity_n,
    velocity_d,
    guidance_high,
    guidance_low,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
    GUIDED: tl.constexpr,
):
    row, col, inside = tile(rows, width, ROWS, COLS)
    at = row.to(tl.int64) * width + col
    slope = load_tile(
        conditional, row, col, tokens, velocity_b, velocity_n, velocity_d, inside, ACC
    )
    if GUIDED:
        other = load_tile(
            unconditional, row, col, tokens, velocity_b, velocity_n, velocity_d, inside, ACC
        )
        slope = other + joined(guidance_high, guidance_low, ACC) * (slope - other)
    state = tl.load(coefficients) * load_tile(x, row, col, tokens, x_b, x_n, x_d, inside, ACC)
    state += tl.load(coefficients + 1) * slope
    for r in range(count):
        coefficient = tl.load(coefficients + 2 + r)
        if coefficient != 0:
            earlier = slopes + tl.cast(r, tl.int64) * slopes_r + at
            state += coefficient * tl.load(earlier, mask=inside, other=0.0)
    if slot is not None:
        kept = tl.load(slot)
        # Threads may store other elements than they load: nothing is stored before all is loaded.
        tl.debug_barrier()
        tl.store(slopes + kept * slopes_r + at, slope, mask=inside & (kept >= 0) & (kept < count))
    if clamp is not None:
        bound = tl.load(clamp)
        state = tl.where(state > bound, bound, tl.where(state < -bound, -bound, state))
    tl.store(out + at, state, mask=inside)


def forward(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    slot: Tensor | None,
    clamp: Tensor | None,
    guidance_scale: float,
    out: Tensor,
) -> None:
    """Write the new state to ``out``. ``out`` and the rows of ``slopes`` are contiguous."""
    if not out.numel():
        return
    guided = guidance_scale != 1.0
    halves = velocity.chunk(2) if guided else (velocity, velocity)
    state, conditional, unconditional = merged(x, *halves)
    samples, tokens, width = state.shape
    launch = elementwise_launch(samples * tokens, width)
    with on_device(x):
        _update_kernel[launch.grid](
            state,
            conditional,
            unconditional,
            slopes,
            unit_stride(coefficients),
            slot,
            clamp,
            out,
            samples * tokens,
            tokens,
            width,
            slopes.shape[0],
            slopes.stride(0),
            *state.stride(),
            *conditional.stride(),
            *split(guidance_scale),
            ROWS=launch.rows,
            COLS=launch.columns,
            ACC=accumulator(x),
            GUIDED=guided,
            num_warps=4,
            enable_fp_fusion=False,
        )
