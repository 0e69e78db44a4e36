"""``swiglu.cu`` run on the host, judged by the reference in fp64."""

import pytest
import torch

from blip3o_fast import reference
from tests.csrc.interface import Kernels
from tests.kernels.oracle import check, laid_out, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Inner widths: scalar, one access, several rows a block, more than a block.
@pytest.mark.parametrize("width", [1, 7, 8, 96, 2056])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(kernels: Kernels, width: int, dtype: torch.dtype) -> None:
    gate_up = randn(2, 9, 2 * width, dtype=dtype, scale=4.0)
    check(kernels.swiglu, reference.swiglu, (gate_up,))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "halves"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    gate_up = laid_out(randn(3, 5, 64, dtype=torch.bfloat16), layout)
    check(kernels.swiglu, reference.swiglu, (gate_up,), cotangent=layout)


def test_extremes_stay_finite(kernels: Kernels) -> None:
    """exp overflows to infinity on one side; the sigmoid is 0 there, not NaN."""
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    gate_up = torch.cat((gate, torch.ones(5))).view(1, 1, 10).requires_grad_()
    out = kernels.swiglu(gate_up)
    (gradient,) = torch.autograd.grad(out.sum(), gate_up)
    assert out.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64), (2, 5, 0)])
def test_empty(kernels: Kernels, shape: tuple[int, ...]) -> None:
    gate_up = torch.empty(shape, requires_grad=True)
    out = kernels.swiglu(gate_up)
    assert out.shape == (*shape[:2], shape[2] // 2)
    assert torch.autograd.grad(out.sum(), gate_up)[0].shape == shape
