"""Rectified flow, independent of any network: path, times, solvers, loss."""

from blip3o_fast.flow.integrate import Callback, draw_noise, integrate
from blip3o_fast.flow.loss import RectifiedFlowLoss
from blip3o_fast.flow.path import clean_estimate, interpolate, velocity_target
from blip3o_fast.flow.schedule import TimeGrid, sample_times, time_grid
from blip3o_fast.flow.solvers import SOLVERS, Solver, Step, find_solver

__all__ = [
    "interpolate",
    "velocity_target",
    "clean_estimate",
    "TimeGrid",
    "time_grid",
    "sample_times",
    "SOLVERS",
    "Solver",
    "Step",
    "find_solver",
    "Callback",
    "integrate",
    "draw_noise",
    "RectifiedFlowLoss",
]
