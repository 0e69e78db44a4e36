"""The product's own loop, for tests that bring a velocity of their own."""

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
