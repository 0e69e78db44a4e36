"""Gradients of the fused ops against finite differences, in fp64."""

import pytest
import torch

from blip3o_fast import ops
from tests.ops.cases import CASES, outputs


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("width", [1, 5], ids=lambda w: f"width{w}")
def test_gradcheck(device, case, width):
    leaves = case.leaves(batch=2, tokens=2, width=width, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda *tensors: outputs(case.call(*tensors, impl=ops.Impl.TRITON)),
        leaves,
        fast_mode=True,
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable > 1], ids=lambda c: c.name)
def test_each_input_alone(device, case):
    """A gradient does not depend on which others are wanted."""
    leaves = case.leaves(device=device)
    total = sum(u.square().sum() for u in outputs(case.call(*leaves, impl=ops.Impl.TRITON)))
    together = torch.autograd.grad(total, leaves)
    for i, expected in enumerate(together):
        alone = [u.detach().requires_grad_(i == j) for j, u in enumerate(leaves)]
        total = sum(u.square().sum() for u in outputs(case.call(*alone, impl=ops.Impl.TRITON)))
        assert torch.equal(torch.autograd.grad(total, alone[i])[0], expected), i
