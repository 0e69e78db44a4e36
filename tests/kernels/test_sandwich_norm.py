"""The sandwich norm kernels against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON
EPS = 1e-6


def fused(x, w1, w2, shift, scale):
    return ops.sandwich_norm(x, w1, w2, shift, scale, eps=EPS, impl=IMPL)


def expected(x, w1, w2, shift, scale):
    return reference.sandwich_norm(x, w1, w2, shift, scale, EPS)


def inputs(batch, tokens, width, dtype=torch.float32, device="cpu", parameters=None, scale=1.0):
    parameters = parameters or dtype
    return [
        randn(batch, tokens, width, dtype=dtype, device=device, scale=scale),
        randn(width, dtype=parameters, device=device, seed=1, scale=0.3, offset=1),
        randn(width, dtype=parameters, device=device, seed=2, scale=0.3, offset=1),
        randn(batch, width, dtype=parameters, device=device, seed=3),
        randn(batch, width, dtype=parameters, device=device, seed=4, scale=0.5),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 8, 64, 123])
def test_widths(device, dtype, width):
    check(fused, expected, inputs(2, 3, width, dtype, device))


def test_width_of_one(device):
    """The gradients of x and w1 are 0 up to eps there, and any fp32 path returns noise."""
    check(fused, expected, inputs(2, 3, 1, device=device), differentiable=[2, 3, 4])


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    check(fused, expected, inputs(1, tokens, 8, torch.bfloat16, device))


@pytest.mark.parametrize("width", [768, 1024, 1500])
def test_model_widths(device, width):
    check(fused, expected, inputs(2, 9, width, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_parameters(device, dtype):
    check(fused, expected, inputs(2, 5, 24, dtype, device, parameters=torch.float32))


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e3], ids=lambda s: f"rms{s:g}")
def test_magnitudes(device, scale):
    check(fused, expected, inputs(2, 5, 24, device=device, scale=scale))


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded", "spread"])
def test_layouts(device, layout, cotangent):
    x, w1, w2, shift, scale = inputs(3, 5, 14, device=device)
    shift, scale = (
        laid_out(u, "sliced" if layout == "transposed" else layout) for u in (shift, scale)
    )
    w1 = laid_out(w1[None], "spread")[0]
    check(fused, expected, [laid_out(x, layout), w1, w2, shift, scale], cotangent=cotangent)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0), (0, 0)])
def test_empty(device, batch, tokens):
    check(fused, expected, inputs(batch, tokens, 8, device=device))


def test_frozen_parameters(device):
    check(fused, expected, inputs(2, 5, 24, device=device), differentiable=[0])


def test_frozen_input(device):
    check(fused, expected, inputs(2, 5, 24, device=device), differentiable=[1, 2, 3, 4])


def test_bitwise_repeatable(device):
    values = [u.requires_grad_() for u in inputs(2, 5, 24, torch.bfloat16, device)]
    runs = []
    for _ in range(repeats(device)):
        h = fused(*values)
        runs.append((h, *torch.autograd.grad(h.sum(), values)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_batch_invariant(device):
    x, w1, w2, shift, scale = inputs(8, 9, 24, torch.bfloat16, device)
    x.requires_grad_()
    h = fused(x, w1, w2, shift, scale)
    (dx,) = torch.autograd.grad(h.sum(), x)
    one = x[5:6].detach().requires_grad_()
    h_one = fused(one, w1, w2, shift[5:6], scale[5:6])
    assert torch.equal(h_one, h[5:6])
    assert torch.equal(torch.autograd.grad(h_one.sum(), one)[0], dx[5:6])


def test_width_beyond_one_program(device):
    with pytest.raises(ValueError, match=r"width from 1 to 8192.*got 8193|at most 3072 wide"):
        fused(*inputs(1, 1, 8193, device=device))
