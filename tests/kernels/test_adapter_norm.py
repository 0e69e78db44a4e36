"""The adapter's LayerNorm and GELU kernels against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TRITON = ops.Impl.TRITON
EPS = 1e-5


def fused(x, weight, bias):
    return ops.adapter_norm(x, weight, bias, eps=EPS, impl=TRITON)


def expected(x, weight, bias):
    return reference.adapter_norm(x, weight, bias, EPS)


def inputs(
    batch, tokens, width, padding=0, dtype=torch.float32, device="cpu", parameters=None, scale=1.0
):
    parameters = parameters or dtype
    x = randn(batch, tokens, width + padding, dtype=dtype, device=device, scale=scale, offset=0.5)
    return [
        x,
        randn(width, dtype=parameters, device=device, seed=1, scale=0.3, offset=1),
        randn(width, dtype=parameters, device=device, seed=2, scale=0.5),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, padding", [(7, 1), (8, 0), (61, 3), (123, 5), (33, 31)])
def test_widths(device, dtype, width, padding):
    check(fused, expected, inputs(2, 3, width, padding, dtype, device))


def test_width_of_one(device):
    """A row of one column is its own mean: x and the weight get no gradient beyond rounding."""
    check(fused, expected, inputs(2, 3, 1, device=device), differentiable=[2])


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    check(fused, expected, inputs(1, tokens, 7, 1, torch.bfloat16, device))


@pytest.mark.parametrize("width, padding", [(1322, 22), (1877, 43), (3541, 43)])
def test_adapter_widths(device, width, padding):
    check(fused, expected, inputs(2, 9, width, padding, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_parameters(device, dtype):
    check(fused, expected, inputs(2, 5, 21, 3, dtype, device, parameters=torch.float32))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e3], ids=lambda s: f"std{s:g}")
def test_magnitudes(device, scale):
    """The mean is 0.5: a row that varies by less loses digits to it."""
    lost = max(1.0, 0.5 / (scale**2 + EPS) ** 0.5)
    check(fused, expected, inputs(2, 5, 24, device=device, scale=scale), conditioning=lost)


def test_both_tails_of_the_gelu(device):
    x, weight, bias = inputs(2, 5, 24, device=device)
    check(fused, expected, [x, 10 * weight, bias])


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded", "spread"])
def test_layouts(device, layout, cotangent):
    x, weight, bias = inputs(3, 5, 11, 3, device=device)
    weight = laid_out(weight[None], "spread")[0]
    check(fused, expected, [laid_out(x, layout), weight, bias], cotangent=cotangent)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0), (0, 0)])
def test_empty(device, batch, tokens):
    check(fused, expected, inputs(batch, tokens, 7, 1, device=device))


@pytest.mark.parametrize("differentiable", [[0], [1, 2], [1], [0, 2]], ids=str)
def test_frozen(device, differentiable):
    check(fused, expected, inputs(2, 5, 21, 3, device=device), differentiable=differentiable)


def test_padding_is_neither_read_nor_given_a_gradient(device):
    values = inputs(2, 5, 21, 3, device=device)
    values[0][..., 21:] = torch.nan
    for u in values:
        u.requires_grad_()
    h = fused(*values)
    assert h.isfinite().all() and not h[..., 21:].any()
    upstream = torch.ones_like(h)
    upstream[..., 21:] = torch.nan
    grads = torch.autograd.grad(h, values, upstream)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][..., 21:].any()


def test_bitwise_repeatable(device):
    values = [u.requires_grad_() for u in inputs(2, 37, 21, 3, torch.bfloat16, device)]
    runs = []
    for _ in range(repeats(device)):
        h = fused(*values)
        runs.append((h, *torch.autograd.grad(h.sum(), values)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_batch_invariant(device):
    x, weight, bias = inputs(8, 9, 21, 3, torch.bfloat16, device)
    x.requires_grad_()
    h = fused(x, weight, bias)
    (dx,) = torch.autograd.grad(h.sum(), x)
    one = x[5:6].detach().requires_grad_()
    h_one = fused(one, weight, bias)
    assert torch.equal(h_one, h[5:6])
    assert torch.equal(torch.autograd.grad(h_one.sum(), one)[0], dx[5:6])


def test_width_beyond_one_program(device):
    with pytest.raises(ValueError, match=r"width from 1 to 8192.*got 8193"):
        fused(*inputs(1, 1, 8193, device=device))
