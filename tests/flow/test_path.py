"""The conventions of time, proved."""

import torch

from blip3o_fast.flow import interpolate

torch.manual_seed(0)
X1, NOISE = torch.randn(2, 5, 7, 3, dtype=torch.float64)
T = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)


def test_ends_of_the_path():
    x_t = interpolate(X1, NOISE, T)
    assert torch.equal(x_t[0], NOISE[0])
    assert torch.equal(x_t[-1], X1[-1])


def test_velocity_is_the_derivative_of_the_path():
    h = 1e-6
    slope = (interpolate(X1, NOISE, T + h) - interpolate(X1, NOISE, T)) / h
    torch.testing.assert_close(slope, X1 - NOISE, rtol=1e-6, atol=1e-6)
