"""From EVA tokens and noise to CLIP tokens: make a plan, call it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_fast.flow import Callback
from blip3o_fast.flow.schedule import GridName
from blip3o_fast.flow.solvers import SolverName
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl
from blip3o_fast.sampling.plan import SamplingPlan


def generate(
    model: DiT,
    eva_features: Tensor,
    num_inference_steps: int = 50,
    *,
    solver: SolverName = "heun",
    guidance_scale: float = 1.0,
    grid: GridName | Sequence[float] | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    dtype: torch.dtype | None = None,
    impl: Impl | None = None,
    graph: bool | None = None,
) -> Tensor:
    """Translate EVA tokens ``[B, N, E]`` into CLIP tokens ``[B, N, C]``.

    The arguments are those of ``BLIP3oDiT.generate``, where ``grid`` is called ``time_grid``. What
    the plan needs is kept from call to call: packed weights, modulation tables and CUDA graphs.
    """
    plan = SamplingPlan(
        model,
        steps=num_inference_steps,
        solver=solver,
        guidance_scale=guidance_scale,
        time_grid=grid,
        dtype=dtype,
        impl=impl,
        graph=graph,
    )
    return plan(eva_features, noise, generator, seeds, progress, callback)
