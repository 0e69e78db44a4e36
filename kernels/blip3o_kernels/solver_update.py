"""``out = x + dt s``, ``s = weight v + previous_weight v_previous``: one update of the ODE state.

With guidance the velocities hold the conditional half over the unconditional one, and
``s := s_uncond + guidance (s_cond - s_uncond)`` (arXiv:2207.12598). With a bound the result is
clamped to it; NaN stays NaN.

Per element: reads x and one to four velocities, each in its own dtype, writes 1. Computes in fp32,
in fp64 for an fp64 state. dt may lie on the device, so that a CUDA graph replays it as it changes.
"""

import triton.language as tl
from torch import Tensor

from blip3o_kernels.arithmetic import joined, split
from blip3o_kernels.launch import accumulator, elementwise_launch, merged, on_device
from blip3o_kernels.tiles import load_tile, tile
from blip3o_kernels.typed import jit


@jit
def _slope(
    velocity,
    previous,
    row,
    col,
    tokens,
    velocity_b,
    velocity_n,
    velocity_d,
    previous_b,
    previous_n,
    previous_d,
    inside,
    weight,
    previous_weight,
    ACC: tl.constexpr,
):
    """``weight v + previous_weight v_previous`` of one half."""
    v = load_tile(velocity, row, col, tokens, velocity_b, velocity_n, velocity_d, inside, ACC)
    slope = weight * v
    if previous is not None:
        slope += previous_weight * load_tile(
            previous, row, col, tokens, previous_b, previous_n, previous_d, inside, ACC
        )
    return slope


@jit(do_not_specialize=["rows", "tokens"])
def _update_kernel(
    x,
    conditional,
    unconditional,
    previous_conditional,
    previous_unconditional,
    dt_on_device,
    out,
    rows,
    tokens,
    width,
    x_b,
    x_n,
    x_d,
    velocity_b,
    velocity_n,
    velocity_d,
    previous_b,
    previous_n,
    previous_d,
    dt_high,
    dt_low,
    weight_high,
    weight_low,
    previous_high,
    previous_low,
    guidance_high,
    guidance_low,
    bound_high,
    bound_low,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ACC: tl.constexpr,
    GUIDED: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    row, col, inside = tile(rows, width, ROWS, COLS)
    weight = joined(weight_high, weight_low, ACC)
    previous_weight = joined(previous_high, previous_low, ACC)
    slope = _slope(
        conditional,
        previous_conditional,
        row,
        col,
        tokens,
        velocity_b,
        velocity_n,
        velocity_d,
        previous_b,
        previous_n,
        previous_d,
        inside,
        weight,
        previous_weight,
        ACC,
    )
    if GUIDED:
        other = _slope(
            unconditional,
            previous_unconditional,
            row,
            col,
            tokens,
            velocity_b,
            velocity_n,
            velocity_d,
            previous_b,
            previous_n,
            previous_d,
            inside,
            weight,
            previous_weight,
            ACC,
        )
        slope = other + joined(guidance_high, guidance_low, ACC) * (slope - other)
    dt = joined(dt_high, dt_low, ACC) if dt_on_device is None else tl.load(dt_on_device).to(ACC)
    state = load_tile(x, row, col, tokens, x_b, x_n, x_d, inside, ACC)
    state += dt * slope
    if CLAMPED:
        bound = joined(bound_high, bound_low, ACC)
        state = tl.where(state > bound, bound, tl.where(state < -bound, -bound, state))
    tl.store(out + row.to(tl.int64) * width + col, state.to(out.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    velocity: Tensor,
    dt: Tensor | float,
    *,
    previous: Tensor | None,
    weight: float,
    previous_weight: float,
    guidance_scale: float,
    clamp: float | None,
) -> Tensor:
    """``[B, N, C]`` and velocities ``[B or 2B, N, C]`` to the new state, contiguous."""
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    guided = guidance_scale != 1.0
    halves = [*_halves(velocity, guided), *([] if previous is None else _halves(previous, guided))]
    state, *halves = merged(x, *halves)
    samples, tokens, width = state.shape
    conditional, unconditional, *previous_halves = halves
    previous_conditional, previous_unconditional = previous_halves or (None, None)
    launch = elementwise_launch(samples * tokens, width)
    on_device_already = isinstance(dt, Tensor)
    with on_device(x):
        _update_kernel[launch.grid](
            state,
            conditional,
            unconditional,
            previous_conditional,
            previous_unconditional,
            dt if on_device_already else None,
            out,
            samples * tokens,
            tokens,
            width,
            *state.stride(),
            *conditional.stride(),
            *(conditional if previous_conditional is None else previous_conditional).stride(),
            *split(0.0 if on_device_already else dt),
            *split(weight),
            *split(previous_weight),
            *split(guidance_scale),
            *split(0.0 if clamp is None else clamp),
            ROWS=launch.rows,
            COLS=launch.columns,
            ACC=accumulator(x),
            GUIDED=guided,
            CLAMPED=clamp is not None,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _halves(velocity: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional half; twice the same where there is one."""
    if not guided:
        return velocity, velocity
    half = velocity.shape[0] // 2
    return velocity[:half], velocity[half:]
