"""Autocast: row ops compute in the dtypes that they are given, attention is cast like a product."""

import pytest
import torch

from blip3o_fast import ops
from tests.kernels.oracle import randn
from tests.ops.cases import CASES, label, outputs, solver_update, update_inputs

IMPLS = pytest.mark.parametrize(
    "impl", [ops.Impl.TRITON, ops.Impl.REFERENCE], ids=lambda i: i.value
)


def run(case, leaves, impl):
    results = outputs(case.call(*leaves, impl=impl))
    wanted = leaves[: case.differentiable]
    return [*results, *torch.autograd.grad(sum(u.square().sum() for u in results), wanted)]


@IMPLS
@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_inside_a_row_op(device, case, impl, dtype):
    plain = run(case, case.leaves(dtype=dtype, device=device), impl)
    with torch.autocast(device.type, torch.bfloat16):
        cast = run(case, case.leaves(dtype=dtype, device=device), impl)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("impl", [*IMPLS.args[1], ops.Impl.ATEN], ids=lambda i: i.value)
def test_the_state_of_the_solver_stays_fp32(device, impl):
    if impl is ops.Impl.ATEN and device.type != "cpu":
        pytest.skip("ATen's passes are for a CPU")
    x, velocity, slopes, coefficients = update_inputs(device=device)
    velocity, kept = velocity.bfloat16(), slopes.clone()
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        got = solver_update(x, velocity, slopes, coefficients, impl=impl)
    assert got.dtype == torch.float32
    with torch.no_grad():
        plain = solver_update(x, velocity, kept, coefficients, impl=impl)
    assert torch.equal(got, plain) and torch.equal(kept, slopes)


@pytest.mark.parametrize(
    "backend", [None, ops.AttentionBackend.SDPA, ops.AttentionBackend.REFERENCE], ids=str
)
def test_attention_is_cast_like_a_product(device, backend):
    q, k, v = (randn(2, 5, heads, 16, device=device) for heads in (4, 2, 2))
    with torch.autocast(device.type, torch.bfloat16):
        out = ops.attention(q, k, v, backend=backend)
        wide = ops.attention(q.double(), k.double(), v.double(), backend=ops.AttentionBackend.SDPA)
    expected = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_device_without_autocast(case):
    """Shapes alone, on the meta device, which autocast does not know."""
    results = outputs(case.call(*case.inputs(device="meta"), impl=ops.Impl.REFERENCE))
    expected = outputs(case.call(*case.inputs(), impl=ops.Impl.REFERENCE))
    assert [x.shape for x in results] == [x.shape for x in expected]
