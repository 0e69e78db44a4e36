"""``solver_update.cu`` run on the host, judged by the reference in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from blip3o_fast import reference
from tests.csrc.interface import Kernels
from tests.kernels.oracle import judge, laid_out, randn

CHOICES: list[dict[str, Any]] = [
    {},
    {"slot": torch.tensor([1])},
    {"guidance_scale": 3.0, "slot": torch.tensor([-1])},
    {"guidance_scale": 2.5, "slot": torch.tensor([0]), "clamp": torch.tensor([0.7])},
]


def inputs(width: int, rows: int = 2, *, halves: int = 1) -> tuple[Tensor, ...]:
    """State, velocity, slopes and coefficients."""
    shapes = (2, 5, width), (2 * halves, 5, width), (rows, 2, 5, width), (rows + 2,)
    return tuple(randn(*shape, seed=i) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("width", [1, 30, 36, 64, 2056])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers(kernels: Kernels, choice: dict[str, Any], width: int, dtype: torch.dtype) -> None:
    x, v, slopes, numbers = inputs(width, halves=2 if "guidance_scale" in choice else 1)
    v, ours_slopes, same_slopes, true_slopes = v.to(dtype), *(slopes.clone() for _ in range(3))
    true_slopes = true_slopes.double()
    ours = kernels.solver_update(x, v, ours_slopes, numbers, **choice)
    truth = reference.solver_update(x.double(), v.double(), true_slopes, numbers.double(), **choice)
    same = reference.solver_update(x, v, same_slopes, numbers, **choice)
    judge("state", ours, same, truth)
    judge("slopes", ours_slopes, same_slopes, true_slopes)
    assert torch.equal(ours, same) and torch.equal(ours_slopes, same_slopes)


@pytest.mark.parametrize("width", [5, 8])
def test_rows_without_a_coefficient_are_not_read(kernels: Kernels, width: int) -> None:
    x, v, slopes, numbers = inputs(width, rows=3)
    numbers[3], slopes[1] = 0, torch.nan
    ours = kernels.solver_update(x, v, slopes, numbers, slot=torch.tensor([1]))
    expected = reference.solver_update(x, v, slopes[::2], numbers[[0, 1, 2, 4]])
    assert torch.equal(ours, expected) and torch.equal(slopes[1], v)


@pytest.mark.parametrize("slot", [-1, 2, 2**33])
def test_nothing_is_written_where_there_is_no_row(kernels: Kernels, slot: int) -> None:
    x, v, slopes, numbers = inputs(8)
    before = slopes.clone()
    kernels.solver_update(x, v, slopes, numbers, slot=torch.tensor([slot]))
    assert torch.equal(slopes, before)


@pytest.mark.parametrize("width", [7, 32])
def test_in_place(kernels: Kernels, width: int) -> None:
    x, v, slopes, numbers = inputs(width)
    expected = reference.solver_update(x, v, slopes.clone(), numbers)
    assert kernels.solver_update(x, v, slopes, numbers, out=x) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    x, v, slopes, numbers = inputs(16)
    x, v = laid_out(x, layout), laid_out(v, layout)
    expected = reference.solver_update(x, v, slopes, numbers)
    assert torch.equal(kernels.solver_update(x, v, slopes, numbers), expected)


def test_clamp_keeps_nan(kernels: Kernels) -> None:
    """A diverged sample shows; it does not turn into the bound."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0]).view(1, 1, 4)
    out = kernels.solver_update(
        x, torch.zeros_like(x), x[None][:0], torch.ones(2), clamp=torch.ones(1)
    )
    torch.testing.assert_close(
        out, torch.tensor([torch.nan, 1.0, -1.0, 1.0]).view(1, 1, 4), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_empty(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    out = kernels.solver_update(x, x, torch.empty(2, *shape), torch.ones(4))
    assert out.shape == shape
