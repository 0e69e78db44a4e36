"""The kernels of the adapter's gated sum against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TRITON = ops.Impl.TRITON


def fused(gate, adapted, residual):
    return ops.adapter_mix(gate, adapted, residual, impl=TRITON)


def inputs(batch, tokens, width, dtype=torch.float32, device="cpu", scale=2.0):
    return [
        randn(batch, tokens, width, dtype=dtype, device=device, seed=seed, scale=scale)
        for seed in range(3)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 123])
def test_widths(device, dtype, width):
    check(fused, reference.adapter_mix, inputs(2, 3, width, dtype, device))


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    check(fused, reference.adapter_mix, inputs(2, tokens, 8, torch.bfloat16, device))


def test_more_columns_than_one_program_holds(device):
    check(fused, reference.adapter_mix, inputs(1, 2, 2500, device=device))


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_mixed_dtypes(device, wide):
    values = inputs(2, 5, 24, torch.bfloat16, device)
    values[wide] = values[wide].float()
    check(fused, reference.adapter_mix, values)


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded", "spread"])
def test_layouts(device, layout, cotangent):
    gate, adapted, residual = inputs(3, 5, 14, device=device)
    values = [laid_out(gate, "halves"), laid_out(adapted, layout), residual]
    check(fused, reference.adapter_mix, values, cotangent=cotangent)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0), (0, 0)])
def test_empty(device, batch, tokens):
    check(fused, reference.adapter_mix, inputs(batch, tokens, 8, device=device))


@pytest.mark.parametrize("differentiable", [[0], [1, 2]], ids=str)
def test_frozen(device, differentiable):
    values = inputs(2, 5, 24, device=device)
    check(fused, reference.adapter_mix, values, differentiable=differentiable)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_saturated_gate(device):
    gate = torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 1e4]]], device=device)
    adapted, residual = torch.full_like(gate, 3), torch.full_like(gate, 5)
    torch.testing.assert_close(
        fused(gate, adapted, residual), torch.tensor([[[5.0, 5.0, 4.0, 3.0, 3.0]]], device=device)
    )


def test_bitwise_repeatable_and_batch_invariant(device):
    values = [u.requires_grad_() for u in inputs(8, 33, 46, torch.bfloat16, device)]
    runs = []
    for _ in range(repeats(device)):
        h = fused(*values)
        runs.append((h, *torch.autograd.grad(h.sum(), values)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(fused(*(u[5:6] for u in values)), runs[0][0][5:6])
