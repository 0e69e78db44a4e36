"""The gated projection: two products and one packed product are the same function."""

import pytest
import torch
import torch.nn.functional as F

from blip3o_fast import ops
from tests.kernels.oracle import check, randn

IMPLS = pytest.mark.parametrize("impl", [ops.Impl.REFERENCE, ops.Impl.TRITON], ids=str)


@IMPLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_and_gradients(device, impl, dtype):
    values = [randn(2, 5, 12, dtype=dtype, device=device)]
    values.append(randn(14, 12, dtype=dtype, device=device, seed=1, scale=0.3))

    def expected(x, weight):
        return F.silu(x @ weight[:7].T) * (x @ weight[7:].T)

    check(lambda x, weight: ops.gated_linear(x, weight, impl=impl), expected, values)


@IMPLS
def test_autocast(device, impl):
    x, weight = randn(2, 5, 12, device=device), randn(14, 12, device=device, seed=1)
    with torch.autocast(device.type, torch.bfloat16):
        got = ops.gated_linear(x, weight, impl=impl)
    assert got.dtype == torch.bfloat16
    wide = F.silu(x @ weight[:7].T) * (x @ weight[7:].T)
    assert (got - wide).norm() < 0.02 * wide.norm()


def test_bad_shapes():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape \[W, D=4\], got \[6, 5\]"):
        ops.gated_linear(x, torch.ones(6, 5))
    with pytest.raises(ValueError, match="weight: expected an even number of rows 2I, got 7"):
        ops.gated_linear(x, torch.ones(7, 4))
    with pytest.raises(ValueError, match=r"x: expected shape \[B, N, D\], got \[3, 4\]"):
        ops.gated_linear(x[0], torch.ones(6, 4))
