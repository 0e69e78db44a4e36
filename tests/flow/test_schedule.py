"""Time grids and time distributions."""

import pytest
import torch

from blip3o_fast.flow import find_solver, sample_times, time_grid


def labels(grid, steps, solver):
    return [e.label for e in find_solver(solver).evaluations(time_grid(grid, steps))]


def test_ascending_heun_labels_stay_in_the_unit_interval():
    got = labels("ascending", 5, "heun")
    assert got == pytest.approx([0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0])


def test_published_heun_labels_leave_it():
    got = labels("published", 5, "heun")
    assert got == pytest.approx([1.0, 1.2, 0.8, 1.0, 0.6, 0.8, 0.4, 0.6, 0.2, 0.4])


def test_published_trainer_labels():
    got = labels("published_trainer", 5, "heun")
    assert got == pytest.approx([1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0])


@pytest.mark.parametrize(
    ("name", "clamp"), [("ascending", None), ("published", 50.0), ("published_trainer", 10.0)]
)
def test_clamps(name, clamp):
    assert time_grid(name, 3).clamp == clamp


def test_given_times():
    grid = time_grid([0, 0.5, 0.6, 1], 3)
    assert grid.lengths == pytest.approx((0.5, 0.1, 0.4))
    assert [grid.label(2, fraction) for fraction in (0.0, 1.0)] == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize(
    ("grid", "steps", "message"),
    [
        ("ascending", 0, "num_inference_steps: expected at least 1, got 0"),
        ("sideways", 3, "time_grid: expected ascending, published.* got 'sideways'"),
        ([0, 0.5, 1], 3, "time_grid: expected 4 increasing times from 0 to 1"),
        ([0, 0.7, 0.5, 1], 3, "time_grid: expected 4 increasing times"),
        ([0.1, 0.5, 0.7, 1], 3, "time_grid: expected 4 increasing times"),
    ],
)
def test_bad_grids(grid, steps, message):
    with pytest.raises(ValueError, match=message):
        time_grid(grid, steps)


@pytest.mark.parametrize(
    ("name", "mean", "variance"),
    [
        # Beta(1/2, 1/2): variance 1/8; uniform: 1/12; sigmoid of a standard normal: 0.0434 by
        # numerical integration.
        ("beta", 0.5, 1 / 8),
        ("uniform", 0.5, 1 / 12),
        ("logit_normal", 0.5, 0.0434),
    ],
)
def test_moments_of_time_distributions(name, mean, variance):
    t = sample_times(200_000, name, generator=torch.Generator().manual_seed(0))
    assert t.mean().item() == pytest.approx(mean, abs=3e-3)
    assert t.var().item() == pytest.approx(variance, abs=2e-3)
    assert t.min() >= 1e-3 and t.max() <= 1 - 1e-3


def test_beta_quantiles():
    """The arcsine law: P(t < q) = 2/pi arcsin sqrt q."""
    t = sample_times(200_000, "beta", generator=torch.Generator().manual_seed(1))
    for q in (0.05, 0.3, 0.5, 0.9):
        expected = 2 / torch.pi * torch.tensor(q).sqrt().arcsin()
        assert (t < q).float().mean().item() == pytest.approx(expected.item(), abs=4e-3)


def test_unknown_distribution():
    with pytest.raises(ValueError, match="distribution: expected beta, uniform or logit_normal"):
        sample_times(3, "cauchy")
