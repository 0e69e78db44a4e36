"""Walk a time grid with a solver."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from blip3o_fast import ops
from blip3o_fast.flow.schedule import TimeGrid
from blip3o_fast.flow.solvers import Solver, Velocity

Callback = Callable[[int, Tensor], None]
"""``callback(step, x)`` after each step, counted from 0; it must not modify ``x`` ``[B, N, C]``."""


def integrate(
    velocity: Velocity,
    x: Tensor,
    solver: Solver,
    grid: TimeGrid,
    *,
    guidance_scale: float = 1.0,
    impl: ops.Impl | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Carry noise ``x`` to data.

    Args:
        velocity: ``(x, t) -> v``; with guidance it returns both halves, ``[2B, N, C]``.
        x: noise ``[B, N, C]``, fp32 (or fp64).
        solver: one of ``flow.solvers``.
        grid: the steps.
        guidance_scale: 1 is none.
        impl: of ``ops.solver_update``.
        progress: show a bar of steps.
        callback: called after each step.

    Returns:
        ``[B, N, C]``, dtype of ``x``.
    """

    def update(
        x: Tensor,
        velocity: Tensor,
        dt: Tensor | float,
        *,
        previous: Tensor | None = None,
        weight: float = 1.0,
        previous_weight: float = 0.0,
        final: bool = False,
    ) -> Tensor:
        return ops.solver_update(
            x,
            velocity,
            dt,
            previous=previous,
            weight=weight,
            previous_weight=previous_weight,
            guidance_scale=guidance_scale,
            clamp=grid.clamp if final else None,
            impl=impl,
        )

    past: Tensor | None = None
    for i in tqdm(range(len(grid)), desc="sampling", unit="step", disable=not progress):
        x, past = solver.step(velocity, update, x, grid.step(i, solver.fractions), past)
        if callback is not None:
            callback(i, x)
    return x


def draw_noise(
    shape: tuple[int, int, int],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Standard normal ``[B, N, C]`` to start from.

    Args:
        shape: (B, N, C).
        device: where the noise is wanted. A generator draws on its own device, so a CPU generator
            gives the same noise everywhere.
        dtype: precision that the noise is drawn in.
        generator: None is torch's default.
        seeds: one per sample; each sample's noise then depends on its seed alone, not on its batch.
    """
    if seeds is None:
        source = generator.device if generator is not None else device
        return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
    if generator is not None:
        raise ValueError("noise: expected a generator or seeds, got both")
    if len(seeds) != shape[0]:
        raise ValueError(f"seeds: expected {shape[0]}, one per sample, got {len(seeds)}")
    noise = torch.empty(shape, dtype=dtype, device="cpu")
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator("cpu").manual_seed(seed))
    return noise.to(device)
