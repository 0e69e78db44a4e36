"""The swiglu kernels against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON


def fused(gate_up):
    return ops.swiglu(gate_up, impl=IMPL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 123])
def test_widths(device, dtype, width):
    check(fused, reference.swiglu, [randn(2, 3, 2 * width, dtype=dtype, device=device, scale=3)])


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    check(fused, reference.swiglu, [randn(2, tokens, 16, dtype=torch.bfloat16, device=device)])


def test_more_columns_than_one_program_holds(device):
    check(fused, reference.swiglu, [randn(1, 2, 2 * 2500, device=device)])


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded", "spread"])
def test_layouts(device, layout, cotangent):
    x = laid_out(randn(3, 5, 28, device=device), layout)
    check(fused, reference.swiglu, [x], cotangent=cotangent)


@pytest.mark.parametrize(
    "shape", [(14,), (3, 14), (2, 2, 3, 14), (0, 5, 14), (2, 0, 14), (2, 3, 0)]
)
def test_ranks_and_empty(device, shape):
    check(fused, reference.swiglu, [randn(*shape, device=device)])


def test_four_axes_that_cannot_be_merged(device):
    x = randn(3, 2, 5, 14, device=device).transpose(0, 1)
    check(fused, reference.swiglu, [x])


def test_extremes(device):
    x = torch.tensor([[-1e4, 1e4, -100.0, 100.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    torch.testing.assert_close(fused(x), reference.swiglu(x))


def test_bitwise_repeatable_and_batch_invariant(device):
    x = randn(8, 33, 46, dtype=torch.bfloat16, device=device)
    first = fused(x)
    assert all(torch.equal(fused(x), first) for _ in range(repeats(device)))
    assert torch.equal(fused(x[5:6]), first[5:6])
