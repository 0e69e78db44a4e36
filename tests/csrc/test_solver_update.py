"""``solver_update.cu`` run on the host, judged by the reference in fp64."""

import pytest
import torch

from blip3o_fast import reference
from tests.csrc.interface import Kernels
from tests.kernels.oracle import judge, laid_out, randn

# (velocity, state): the same dtype, or a 16-bit velocity under an fp32 state.
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
CHOICES = [
    {},
    {"weight": 0.5, "previous_weight": 0.5},
    {"guidance_scale": 3.0},
    {"guidance_scale": 2.5, "weight": 1.5, "previous_weight": -0.5, "clamp": 0.7},
]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("width", [1, 30, 64, 2048])
@pytest.mark.parametrize(("velocity", "state"), PAIRS)
def test_numbers(
    kernels: Kernels,
    choice: dict[str, float],
    width: int,
    velocity: torch.dtype,
    state: torch.dtype,
) -> None:
    halves = 2 if "guidance_scale" in choice else 1
    x = randn(2, 5, width, dtype=state)
    v, before = (randn(2 * halves, 5, width, dtype=velocity, seed=i) for i in (1, 2))
    previous = before if "previous_weight" in choice else None
    ours = kernels.solver_update(x, v, 0.05, previous=previous, **choice)
    wide = None if previous is None else previous.double()
    truth = reference.solver_update(x.double(), v.double(), 0.05, previous=wide, **choice)
    same = reference.solver_update(x, v, 0.05, previous=previous, **choice)
    judge("state", ours, same, truth)


def test_step_on_the_device_equals_the_number(kernels: Kernels) -> None:
    x, v = randn(1, 3, 16, seed=1), randn(1, 3, 16, seed=2)
    number = kernels.solver_update(x, v, 0.125)
    assert torch.equal(number, kernels.solver_update(x, v, torch.tensor(0.125)))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    x, v = (laid_out(randn(3, 5, 16, seed=i), layout) for i in (1, 2))
    truth = reference.solver_update(x.double(), v.double(), 0.1)
    judge("state", kernels.solver_update(x, v, 0.1), reference.solver_update(x, v, 0.1), truth)


def test_clamp_keeps_nan(kernels: Kernels) -> None:
    """A diverged sample shows; it does not turn into the bound."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0]).view(1, 1, 4)
    out = kernels.solver_update(x, torch.zeros_like(x), 0.1, clamp=1.0)
    torch.testing.assert_close(
        out, torch.tensor([torch.nan, 1.0, -1.0, 1.0]).view(1, 1, 4), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_empty(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert kernels.solver_update(x, x, 0.1).shape == shape
