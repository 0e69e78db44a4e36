"""Solvers on equations whose solution is known."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from walking import walk

from blip3o_fast.flow import SOLVERS, RungeKutta, find_solver, time_grid
from blip3o_fast.words import SolverName

ORDERS = {
    "euler": 1,
    "heun": 2,
    "midpoint": 2,
    "rk4": 4,
    "adams_bashforth2": 2,
    "adams_bashforth3": 3,
    "adams_bashforth4": 4,
}
NAMES = tuple(SOLVERS)  # before a test adds some


def test_command_lines_offer_every_solver():
    assert get_args(SolverName) == (*NAMES, "fitted")


def solve(velocity, x, solver, steps, grid="ascending"):
    return walk(velocity, x, solver, time_grid(grid, steps))


def slow_start(steps):
    """An even grid whose first steps are so short that their low order does not count."""
    short = [4.0**i / 4**8 / steps for i in range(8)]
    return [0.0, *short, *(i / steps for i in range(1, steps + 1))]


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence(solver):
    """dx/dt = -2 t x^2 from 1 reaches 1/2: halving the step divides the error by 2^order."""
    x0 = torch.ones(1, 1, 1, dtype=torch.float64)

    def error(steps):
        times = slow_start(steps)
        x = solve(lambda x, t: -2 * t * x**2, x0, solver, len(times) - 1, times)
        return abs(x.item() - 0.5)

    for coarse, fine in pairwise([error(steps) for steps in (40, 80, 160)]):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_coefficients_are_consistent(solver):
    """A constant slope moves the state by the length of the step, and stages to their time."""
    grid = time_grid([0, 0.1, 0.15, 0.5, 0.8, 1.0], 5)
    evaluations = find_solver(solver).evaluations(grid)
    moved, kept = 0.0, [math.nan] * len(evaluations[0].kept)
    following = [e.label for e in evaluations[1:]] + [1.0]
    for evaluation, label in zip(evaluations, following, strict=True):
        assert moved == pytest.approx(evaluation.label)
        moved = evaluation.state * moved + evaluation.newest
        moved += sum(c * s for c, s in zip(evaluation.kept, kept, strict=True) if c)
        if evaluation.slot >= 0:
            kept[evaluation.slot] = 1.0
        assert moved == pytest.approx(label)
    assert sum(e.ends_step for e in evaluations) == 5


def test_runge_kutta_tableaux_satisfy_their_order_conditions():
    """Hairer, Norsett, Wanner, II.2: sums of products of b, a and c up to the order."""
    for name, solver in SOLVERS.items():
        if not isinstance(solver, RungeKutta):
            continue
        count = len(solver.fractions)
        a = torch.zeros(count, count, dtype=torch.float64)
        for i, row in enumerate(solver.stages, start=1):
            a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        b = torch.tensor(solver.weights, dtype=torch.float64)
        c = torch.tensor(solver.fractions, dtype=torch.float64)
        assert torch.allclose(a.sum(1), c), name
        conditions = (
            (1, b.sum(), 1),
            (2, b @ c, 1 / 2),
            (3, b @ c**2, 1 / 3),
            (3, b @ a @ c, 1 / 6),
            (4, b @ c**3, 1 / 4),
            (4, (b * c) @ a @ c, 1 / 8),
            (4, b @ a @ c**2, 1 / 12),
            (4, b @ a @ a @ c, 1 / 24),
        )
        for order, got, expected in conditions:
            if order <= ORDERS[name]:
                assert got.item() == pytest.approx(expected), name


def test_adams_bashforth_keeps_its_order_on_an_uneven_grid():
    def error(steps):
        times = [(i / steps) ** 1.5 for i in range(steps)] + [1.0]
        x = torch.ones(1, 1, 1, dtype=torch.float64)
        x = solve(lambda x, t: math.cos(3 * t) * x, x, "adams_bashforth2", steps, times)
        return abs(x.item() - math.exp(math.sin(3) / 3))

    assert math.log2(error(80) / error(160)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_straight_paths_are_exact(solver, steps):
    torch.manual_seed(0)
    x1, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    got = solve(lambda x, t: x1 - noise, noise, solver, steps)
    torch.testing.assert_close(got, x1, rtol=1e-12, atol=1e-12)


def gaussian_velocity(mean, std):
    """Exact velocity of the flow from N(0, 1) to N(mean, std^2) along straight paths.

    x_t ~ N(t mean, s_t^2), s_t^2 = (1 - t)^2 + t^2 std^2, and
    E[x_1 - eps | x_t] = mean + (t std^2 - (1 - t)) / s_t^2 (x_t - t mean).
    """

    def velocity(x, t):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


@pytest.mark.parametrize(("mean", "std"), [(2.0, 0.5), (-1.0, 1.0), (3.0, 2.0)])
def test_gaussian_flow_reaches_mean_and_variance(mean, std):
    """50 Heun steps on the consistent grid; the flow is affine, so two points determine it."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
    low, high = solve(gaussian_velocity(mean, std), x, "heun", 50).flatten().tolist()
    assert low == pytest.approx(mean, rel=0.01)
    assert high - low == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 2.0])
def test_published_grid_shrinks_the_mean(std):
    """Walking the labels backwards yields g mean + std x0, g = 2 int_0^1 s_u du - std.

    The factor belongs to the limit of many steps: the published labels are also one step out.
    """
    mean, steps = 2.0, 4000
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
    got = solve(gaussian_velocity(mean, std), x, "euler", steps, "published")
    low, high = got.flatten().tolist()
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    factor = 2 * torch.trapezoid((u**2 + (1 - u) ** 2 * std**2).sqrt(), u).item() - std
    assert low == pytest.approx(factor * mean, rel=2e-3)
    assert high - low == pytest.approx(std, rel=1e-2)
    assert factor < 0.95


def test_published_heun_at_fifty_steps_misses_the_mean():
    """mean 2, std 1: 1.231 instead of 2, measured on the published sampler."""
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    assert solve(gaussian_velocity(2.0, 1.0), x, "heun", 50, "published").item() == pytest.approx(
        1.231, abs=2e-3
    )


def test_unknown_solver():
    with pytest.raises(ValueError, match=r"solver: expected one of euler, heun.* got 'dopri5'"):
        find_solver("dopri5")
