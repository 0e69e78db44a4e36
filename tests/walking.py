"""The product's own loop, and the plain model as a velocity for it."""

import torch

from blip3o_fast.flow import Trajectory, find_solver, solver_table


def walk(velocity, x, solver, grid, **options):
    """Carry ``x`` from noise to data by ``velocity(x, t)``, t a 0-d tensor."""
    evaluations = find_solver(solver).evaluations(grid)
    table = solver_table(evaluations, grid, device=x.device, dtype=x.dtype)
    trajectory = Trajectory(lambda x, row: velocity(x, row.numbers[0]), table, x.clone(), **options)
    with torch.no_grad():
        for _ in evaluations:
            trajectory.advance()
    return trajectory.x


def plain_velocity(model, eva, *, guided):
    """The model itself as ``velocity(x, t)``: every call computes everything.

    With guidance it returns ``[2B, N, C]``: with the condition first, then with the zero condition.
    """
    eva = eva.to(model.dtype)
    if guided:
        eva = torch.cat((eva, torch.zeros_like(eva)))

    def velocity(x, t):
        state = x.to(eva.dtype)
        if guided:
            state = torch.cat((state, state))
        wide = torch.promote_types(eva.dtype, torch.float32)
        times = torch.ones(len(state), device=state.device, dtype=wide) * t
        return model(state, times, eva, return_dict=False)

    return velocity
