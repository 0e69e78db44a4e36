"""Gradients of the fused ops against finite differences, in fp64."""

import pytest
import torch

from blip3o_fast import ops
from tests.kernels.oracle import randn
from tests.ops.cases import ALL_CASES, CASES, label, outputs


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
@pytest.mark.parametrize("width", [1, 5], ids=lambda w: f"width{w}")
def test_gradcheck(device, case, width):
    leaves = case.leaves(batch=2, tokens=2, width=width, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda *tensors: outputs(case.call(*tensors, impl=ops.Impl.TRITON)),
        leaves,
        fast_mode=True,
        nondet_tol=0.0,
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_two_updates_of_a_solver(device, guidance):
    """The second reads the slope that the first kept; the other row is never written nor read."""

    def solve(x, velocities, first, second):
        slopes = x.new_full((2, *x.shape), torch.nan)
        slot, none = torch.tensor([1], device=device), x.new_zeros(1)
        options = {"slot": slot, "guidance_scale": guidance}
        begin = torch.cat((first, none, none))
        end = torch.cat((second[:2], none, second[2:]))
        x = ops.solver_update(x, velocities[0] * x.mean(), slopes, begin, **options)
        return ops.solver_update(x, velocities[1] * x.mean(), slopes, end, **options)

    halves = 1 if guidance == 1 else 2
    shapes = (2, 3, 5), (2, halves * 2, 3, 5), (2,), (3,)
    leaves = [
        randn(*shape, dtype=torch.float64, device=device, seed=i).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    assert torch.autograd.gradcheck(solve, leaves)


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
