"""The model itself as a velocity field: nothing hoisted, what every plan is compared with."""

import torch
from torch import Tensor

from blip3o_fast.flow.solvers import Velocity
from blip3o_fast.model import DiT


def plain_velocity(model: DiT, eva: Tensor, *, guided: bool) -> Velocity:
    """``(x, t) -> v`` by the whole network; guided, the zero condition is stacked under ``eva``.

    Args:
        model: in evaluation mode, unless its dropout is wanted.
        eva: ``[B, N, E]``.
        guided: return ``[2B, N, C]``, the conditional half first.
    """
    eva = eva.to(model.input_proj.weight.dtype)
    wide = torch.promote_types(eva.dtype, torch.float32)
    if guided:
        eva = torch.cat((eva, torch.zeros_like(eva)))

    def velocity(x: Tensor, t: float) -> Tensor:
        state = x.to(eva.dtype)
        if guided:
            state = torch.cat((state, state))
        times = torch.full((state.shape[0],), t, device=state.device, dtype=wide)
        v = model(state, times, eva, return_dict=False)
        assert isinstance(v, Tensor)
        return v

    return velocity
