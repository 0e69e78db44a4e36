"""Derivatives and batching that only ATen's operators know: the reference serves them unasked."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from blip3o_fast.ops import Impl
from tests.kernels.oracle import check
from tests.ops.cases import CASES, label

every = pytest.mark.parametrize("case", CASES, ids=label)
FUSED = pytest.mark.parametrize("impl", [Impl.TRITON, Impl.ATEN], ids=lambda i: i.value)


def automatic(case):
    return lambda *tensors: case.call(*tensors, impl=None)


@every
def test_vmap_in_inference(case):
    """Over a batch of inputs, where ATen's few passes would be chosen."""
    values = case.inputs(dtype=torch.float64)
    batched = [torch.stack((x, 2 * x, -x)) for x in values]
    with torch.no_grad():
        mapped = vmap(automatic(case))(*batched)
        for i in range(3):
            alone = automatic(case)(*(x[i] for x in batched))
            for got, expected in zip(mapped, alone, strict=True):
                torch.testing.assert_close(got[i], expected, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
def test_forward_mode(case, recording):
    """The product of the Jacobian with a vector, against finite differences."""
    values = case.inputs(dtype=torch.float64)
    tangents = [torch.randn_like(x) for x in values]
    step = 1e-6
    with torch.set_grad_enabled(recording):
        _, got = jvp(automatic(case), tuple(values), tuple(tangents))
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, values, tangents)
            dual = [forward_ad.unpack_dual(x).tangent for x in automatic(case)(*duals)]
    ahead, behind = (
        automatic(case)(*(x + s * t for x, t in zip(values, tangents, strict=True)))
        for s in (step, -step)
    )
    for a, b, x, y in zip(ahead, behind, got, dual, strict=True):
        torch.testing.assert_close(x, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


@every
def test_second_derivatives(case):
    values = case.inputs(batch=1, tokens=2, width=3, dtype=torch.float64)
    leaves = [x.requires_grad_(i < case.differentiable) for i, x in enumerate(values)]
    assert torch.autograd.gradgradcheck(automatic(case), leaves, fast_mode=True)


@every
@FUSED
def test_a_kernel_that_is_asked_for_says_why_not(case, impl):
    if impl is Impl.ATEN and case.op.aten is None:
        pytest.skip("no such passes")
    values = case.inputs()
    batched = [x[None] for x in values]
    message = rf"{case.name}: impl={impl.name} .*only the reference.*torch\.func"
    with torch.no_grad():
        with pytest.raises(ValueError, match=message):
            vmap(lambda *tensors: case.call(*tensors, impl=impl))(*batched)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, x) for x in values]
            with pytest.raises(ValueError, match=message):
                case.call(*duals, impl=impl)
    check(
        lambda *tensors: case.call(*tensors, impl=Impl.REFERENCE),
        automatic(case),
        values,
        differentiable=[],
    )
