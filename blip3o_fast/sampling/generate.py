"""From EVA tokens and noise to CLIP tokens: check, draw, walk the grid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_fast.flow import Callback, find_solver, integrate, time_grid
from blip3o_fast.flow.schedule import GridName
from blip3o_fast.flow.solvers import SolverName, Velocity
from blip3o_fast.model import DiT
from blip3o_fast.sampling.inputs import (
    check_features,
    dropout_off,
    starting_noise,
    warn_of_guidance,
)

DEFAULT_GRID: dict[str, GridName] = {"consistent": "ascending", "published": "published"}


@torch.no_grad()
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
) -> Tensor:
    """Translate EVA tokens ``[B, N, E]`` into CLIP tokens ``[B, N, C]``.

    The arguments are those of ``BLIP3oDiT.generate``, where ``grid`` is called ``time_grid``.
    """
    config = model.config
    check_features(model, eva_features)
    rule = find_solver(solver)
    steps = time_grid(grid or DEFAULT_GRID[config.conventions], num_inference_steps)
    warn_of_guidance(config, guidance_scale)
    x = starting_noise(config, eva_features, noise, generator, seeds)
    with dropout_off(model):
        x = integrate(
            plain_velocity(model, eva_features, guided=guidance_scale != 1.0),
            x,
            rule,
            steps,
            guidance_scale=guidance_scale,
            impl=model.impls.solver_update,
            progress=progress,
            callback=callback,
        )
    return (x / config.simple_scale_factor).to(eva_features.dtype)


def plain_velocity(model: DiT, eva: Tensor, *, guided: bool) -> Velocity:
    """The model as a velocity field; guided, the zero condition is stacked under the real one."""
    eva = eva.to(model.input_proj.weight.dtype)
    if guided:
        eva = torch.cat((eva, torch.zeros_like(eva)))

    def velocity(x: Tensor, t: float) -> Tensor:
        state = x.to(eva.dtype)
        if guided:
            state = torch.cat((state, state))
        times = torch.full((state.shape[0],), t, device=state.device)
        v = model(state, times, eva, return_dict=False)
        assert isinstance(v, Tensor)
        return v

    return velocity
