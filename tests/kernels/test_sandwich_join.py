"""The sandwich join kernels against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON
EPS = 1e-6


def call(op, x, y, layer_scale, *norms, **options):
    """``op`` with its tensors in one flat list; an absent norm is four Nones."""
    post, pre = (
        None if norm[0] is None else ops.Modulation(*norm) for norm in (norms[:4], norms[4:])
    )
    return op(x, y, layer_scale, post, pre, eps=EPS, **options)


def fused(*tensors):
    return call(ops.sandwich_join, *tensors, impl=IMPL)


def expected(*tensors):
    return call(reference.sandwich_join, *tensors)


def inputs(batch, tokens, width, dtype=torch.float32, device="cpu", parameters=None, branch=None):
    options = {"dtype": parameters or dtype, "device": device}
    norms = [
        values
        for i in (3, 7)
        for values in (
            randn(width, seed=i, scale=0.3, offset=1, **options),
            randn(width, seed=i + 1, scale=0.3, offset=1, **options),
            randn(batch, width, seed=i + 2, **options),
            randn(batch, width, seed=i + 3, scale=0.5, **options),
        )
    ]
    return [
        randn(batch, tokens, width, dtype=dtype, device=device),
        randn(batch, tokens, width, dtype=branch or dtype, device=device, seed=1),
        randn(width, seed=2, scale=0.3, offset=0.5, **options),
        *norms,
    ]


def without(values, *, scale=False, post=False, pre=False):
    kept = list(values)
    if scale:
        kept[2] = None
    if post:
        kept[3:7] = [None] * 4
    if pre:
        kept[7:11] = [None] * 4
    return kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 8, 64, 123])
def test_widths(device, dtype, width):
    check(fused, expected, inputs(2, 3, width, dtype, device))


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    check(fused, expected, inputs(1, tokens, 8, torch.bfloat16, device))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_parts(device, scale, post, pre, dtype):
    values = without(inputs(2, 3, 14, dtype, device), scale=scale, post=post, pre=pre)
    check(fused, expected, values)


@pytest.mark.parametrize("width", [768, 1024])
def test_model_widths(device, width):
    check(fused, expected, inputs(2, 5, width, torch.bfloat16, device))


@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_dtypes(device, dtype, branch):
    check(fused, expected, inputs(2, 5, 24, dtype, device, parameters=torch.float32, branch=branch))


def test_small_branch(device):
    """At initialisation the scaled branch has a mean square below eps, and eps rules the norm."""
    values = inputs(2, 5, 24, device=device)
    values[1] = values[1] * 1e-4
    check(fused, expected, values)


@pytest.mark.parametrize("layout", ["sliced", "spread", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded", "spread"])
def test_layouts(device, layout, cotangent):
    values = inputs(3, 4, 14, device=device)
    x, y, scale, *norms = values
    norms = [laid_out(u, "halves") if u.dim() == 2 else u for u in norms]
    check(
        fused,
        expected,
        [laid_out(x, layout), laid_out(y, layout), scale, *norms],
        cotangent=cotangent,
    )


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
@pytest.mark.parametrize("post", [False, True])
def test_empty(device, batch, tokens, post):
    check(fused, expected, without(inputs(batch, tokens, 8, device=device), post=post))


@pytest.mark.parametrize("differentiable", [[0], [1], [2], [3, 4, 5, 6], [9]], ids=str)
def test_frozen_parts(device, differentiable):
    check(fused, expected, inputs(2, 3, 14, device=device), differentiable=differentiable)


@pytest.mark.parametrize("used", [0, 1], ids=["x_out", "h"])
def test_one_output_used(device, used):
    check(
        lambda *values: fused(*values)[used],
        lambda *values: expected(*values)[used],
        inputs(2, 3, 14, device=device),
        differentiable=range(7) if used == 0 else range(11),
    )


def test_inputs_are_left_alone(device):
    values = inputs(2, 3, 14, device=device)
    before = [u.clone() for u in values]
    leaves = [u.requires_grad_() for u in values]
    x_out, h = fused(*leaves)
    torch.autograd.grad((x_out.sum() + h.square().sum()), leaves)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_bitwise_repeatable(device):
    values = [u.requires_grad_() for u in inputs(2, 3, 24, torch.bfloat16, device)]
    runs = []
    for _ in range(repeats(device)):
        x_out, h = fused(*values)
        runs.append((x_out, h, *torch.autograd.grad((x_out.sum(), h.sum()), values)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_batch_invariant(device):
    values = inputs(5, 5, 24, torch.bfloat16, device)
    one = [u[3:4] if u.dim() > 1 else u for u in values]
    leaves, single = ([u.requires_grad_() for u in v[:2]] for v in (values, one))
    whole, alone = fused(*leaves, *values[2:]), fused(*single, *one[2:])
    assert all(torch.equal(a, b[3:4]) for a, b in zip(alone, whole, strict=True))
    d_whole = torch.autograd.grad((whole[0].sum(), whole[1].sum()), leaves)
    d_alone = torch.autograd.grad((alone[0].sum(), alone[1].sum()), single)
    assert all(torch.equal(a, b[3:4]) for a, b in zip(d_alone, d_whole, strict=True))


def test_width_beyond_one_program(device):
    with pytest.raises(ValueError, match=r"width from 1 to 8192.*got 8193|at most 3072 wide"):
        fused(*inputs(1, 1, 8193, device=device))
