"""Rectified flow, independent of any network: path, times, solvers, loop, loss."""

from blip3o_fast.flow.fitted import FittedSolver, choose_fitted, load_solvers, save_solvers
from blip3o_fast.flow.loss import RectifiedFlowLoss
from blip3o_fast.flow.path import draw_noise, interpolate
from blip3o_fast.flow.schedule import TimeGrid, sample_times, time_grid
from blip3o_fast.flow.solvers import (
    SOLVERS,
    AdamsBashforth,
    Evaluation,
    RungeKutta,
    Solver,
    find_solver,
)
from blip3o_fast.flow.trajectory import (
    Callback,
    Row,
    SolverTable,
    Trajectory,
    Velocity,
    solver_table,
)

__all__ = [
    "interpolate",
    "draw_noise",
    "TimeGrid",
    "time_grid",
    "sample_times",
    "SOLVERS",
    "Solver",
    "RungeKutta",
    "AdamsBashforth",
    "FittedSolver",
    "choose_fitted",
    "load_solvers",
    "save_solvers",
    "Evaluation",
    "find_solver",
    "Row",
    "Velocity",
    "SolverTable",
    "solver_table",
    "Trajectory",
    "Callback",
    "RectifiedFlowLoss",
]
