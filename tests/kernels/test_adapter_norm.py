"""The adapter's LayerNorm, GELU and dropout kernels against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TRITON, REFERENCE = ops.Impl.TRITON, ops.Impl.REFERENCE
EPS = 1e-5


def fused(x, weight, bias):
    return ops.adapter_norm(x, weight, bias, eps=EPS, impl=TRITON)


def expected(x, weight, bias):
    return reference.adapter_norm(x, weight, bias, None, EPS, 0)


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


def seed_of(number, device="cpu"):
    return torch.tensor([number], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, padding", [(3, 0), (61, 3)])
def test_dropout(device, dtype, width, padding):
    """With the zeros of the reference, values and gradients are held to the same rule."""
    seed = seed_of(width, device)

    def ours(x, weight, bias):
        return ops.adapter_norm(x, weight, bias, eps=EPS, dropout=0.25, seed=seed, impl=TRITON)

    def truth(x, weight, bias):
        return reference.adapter_norm(x, weight, bias, seed, EPS, 65536 // 4)

    check(ours, truth, inputs(2, 3, width, padding, dtype, device))


def kept(x, seed, impl, width=None, dropout=0.3):
    """Where the op drops nothing of rows like ``x``: before dropout all numbers are gelu(1)."""
    width = width or x.shape[-1]
    weight, bias = x.new_zeros(width), x.new_ones(width)
    options = {"dropout": dropout, "seed": seed, "impl": impl}
    return ops.adapter_norm(x, weight, bias, **options)[..., :width] != 0


@pytest.mark.parametrize(
    "layout, width, padding", [("contiguous", 5, 1), ("transposed", 61, 3), ("sliced", 771, 0)]
)
def test_an_element_is_dropped_wherever_it_lies(device, layout, width, padding):
    """Neither implementation, dtype, strides, padding nor other rows matter: bit by bit."""
    x, seed = laid_out(randn(2, 3, width + padding, device=device), layout), seed_of(7, device)
    mask = reference.kept(seed, 6, width, round(0.3 * 65536)).view(2, 3, width)
    assert torch.equal(kept(x, seed, TRITON, width), mask)
    assert torch.equal(kept(x, seed, REFERENCE, width), mask)
    assert torch.equal(kept(x[:1, :2].bfloat16(), seed, TRITON, width), mask[:1, :2])
    assert not torch.equal(kept(x, seed_of(8, device), TRITON, width), mask)


def test_the_generator_gives_published_numbers():
    """Philox4x32 of 7 rounds at counter and key 0, as Random123 lists it."""
    words = torch.tensor([0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48])
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten()
    ranks = halves ^ 0x8000  # the order of int16
    for dropped in (ranks, ranks + 1):
        found = [reference.kept(seed_of(0), 1, 8, int(d))[0, i] for i, d in enumerate(dropped)]
        assert found == [bool(d) for d in dropped == ranks]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_kept_looks_random(share):
    """Within six standard deviations: all, rows, columns, and whether neighbours are kept alike."""
    rows, columns = 512, 520
    mask = reference.kept(seed_of(2**62 + 3), rows, columns, round(share * 65536)).double()
    normal = (mask - (1 - share)) / (share * (1 - share)) ** 0.5
    for sums in (normal.sum(), normal.sum(0), normal.sum(1)):
        assert sums.abs().max() < 6 * (normal.numel() / sums.numel()) ** 0.5
    for down, across in ((0, 1), (0, 2), (0, 4), (0, 8), (1, 0), (8, 0)):
        product = normal[down:, across:] * normal[: rows - down, : columns - across]
        assert product.sum().abs() < 6 * product.numel() ** 0.5


def test_the_mean_is_kept(device):
    """What is left is divided by the share that is kept, after rounding of the probability."""
    x, one = torch.zeros(1, 16, 512, dtype=torch.float64, device=device), seed_of(1, device)
    weight, bias = x.new_zeros(512), x.new_full((512,), 8.0)
    h = ops.adapter_norm(x, weight, bias, dropout=0.1, seed=one, impl=TRITON)
    torch.testing.assert_close(h.max().item(), 8 * 65536 / (65536 - 6554), rtol=1e-14, atol=0)
    assert h.mean().item() == pytest.approx(8.0, rel=0.02)


def test_no_dropout_is_no_difference(device):
    values = inputs(2, 3, 21, 3, device=device)
    for dropout in (0.0, 1e-6):  # the latter rounds to none
        h = ops.adapter_norm(*values, eps=EPS, dropout=dropout, seed=seed_of(1, device))
        assert torch.equal(h, ops.adapter_norm(*values, eps=EPS))
    assert kept(values[0], seed_of(1, device), TRITON, dropout=1 - 1e-9).sum() < 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dropout": 1.0}, "dropout: expected a probability below 1, got 1.0"),
        ({"dropout": float("nan")}, "dropout: expected a probability below 1, got nan"),
        ({"dropout": 0.1}, r"seed: expected int64 of shape \[1\] for dropout, got None"),
        ({"dropout": 0.1, "seed": torch.tensor(1)}, r"seed: .* got torch.int64 of shape \[\] on"),
        ({"dropout": 0.1, "seed": torch.ones(1)}, r"seed: .* got torch.float32 of shape \[1\]"),
    ],
    ids=["one", "nan", "none", "shape", "dtype"],
)
def test_bad_dropout(options, message):
    with pytest.raises(ValueError, match=message):
        ops.adapter_norm(*inputs(1, 2, 8), **options)
