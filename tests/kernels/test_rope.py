"""The rotary kernel and its adjoint against the fp64 reference."""

from itertools import product

import pytest
import torch

from blip3o_fast import ops, reference
from blip3o_fast.ops import OPS
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON


def fused(heads, kv_heads, **options):
    return lambda qkv, cos, sin: ops.rope(
        qkv, cos, sin, num_heads=heads, num_kv_heads=kv_heads, impl=IMPL, **options
    )


def expected(heads, kv_heads):
    return lambda qkv, cos, sin: reference.rope(qkv, cos, sin, heads, kv_heads)


def inputs(batch, tokens, heads, kv_heads, width, dtype=torch.float32, device="cpu", tables=None):
    """Unrelated cos and sin entries: nothing about a rotation is taken for granted."""
    return [
        randn(batch, tokens, (heads + 2 * kv_heads) * width, dtype=dtype, device=device),
        randn(tokens, width, dtype=tables or dtype, device=device, seed=1),
        randn(tokens, width, dtype=tables or dtype, device=device, seed=2),
    ]


def compare(heads, kv_heads, values, **options):
    ops_pair = fused(heads, kv_heads), expected(heads, kv_heads)
    check(*ops_pair, values, differentiable=[0], **options)


def apart(heads, kv_heads):
    """Queries, keys and values, each a tensor of its own."""
    counts = (heads, kv_heads, heads + kv_heads)
    return lambda *tensors: OPS["rope"](*tensors, *counts, impl=IMPL)


def compare_apart(heads, kv_heads, values, **options):
    def truth(*tensors):
        return OPS["rope"].reference(*tensors, heads, kv_heads, heads + kv_heads)

    check(apart(heads, kv_heads), truth, values, differentiable=[0], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 6, 8, 64])
def test_widths(device, dtype, width):
    compare(3, 1, inputs(2, 3, 3, 1, width, dtype, device))


@pytest.mark.parametrize(
    "heads, kv_heads", [(12, 4), (6, 2), (4, 4), (3, 0), (0, 2), (1, 1), (5, 5)]
)
def test_heads(device, heads, kv_heads):
    compare(heads, kv_heads, inputs(2, 3, heads, kv_heads, 8, torch.bfloat16, device))


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    compare(2, 1, inputs(2, tokens, 2, 1, 4, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_tables(device, dtype):
    compare(3, 1, inputs(2, 5, 3, 1, 16, dtype, device, tables=torch.float32))


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["contiguous", "expanded", "spread"])
def test_layouts(device, layout, cotangent):
    qkv, cos, sin = inputs(3, 5, 2, 1, 6, device=device)
    cos, sin = laid_out(cos, "spread"), laid_out(sin, "sliced")
    compare(2, 1, [laid_out(qkv, layout), cos, sin], cotangent=cotangent)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_empty(device, batch, tokens):
    compare(2, 1, inputs(batch, tokens, 2, 1, 8, device=device))


def test_adjoint_of_a_shear(device):
    """<R x, y> = <x, R^T y> for the published tables, whose second half is cos 1, sin 0."""
    qkv, cos, sin = inputs(1, 4, 2, 0, 8, torch.float64, device)
    cos[:, 4:], sin[:, 4:] = 1, 0
    y = randn(*qkv.shape, dtype=torch.float64, device=device, seed=5)
    qkv.requires_grad_()
    turned = fused(2, 0)(qkv, cos, sin)
    (dx,) = torch.autograd.grad(turned, qkv, y)
    torch.testing.assert_close((turned * y).sum(), (qkv * dx).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "spread", "transposed"])
def test_inplace_equals_out_of_place(device, layout):
    qkv, cos, sin = inputs(3, 5, 2, 1, 6, torch.bfloat16, device)
    qkv = laid_out(qkv, layout)
    out = fused(2, 1)(qkv, cos, sin)
    before = qkv.untyped_storage().data_ptr()
    result = fused(2, 1, inplace=True)(qkv, cos, sin)
    assert result is qkv
    assert result.untyped_storage().data_ptr() == before
    assert torch.equal(result, out)


def test_bitwise_repeatable_and_batch_invariant(device):
    qkv, cos, sin = inputs(5, 5, 3, 1, 8, torch.bfloat16, device)
    first = fused(3, 1)(qkv, cos, sin)
    assert all(torch.equal(fused(3, 1)(qkv, cos, sin), first) for _ in range(repeats(device)))
    assert torch.equal(fused(3, 1)(qkv[3:4], cos, sin), first[3:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, width", [(12, 4, 8), (0, 2, 6), (1, 1, 64), (5, 5, 2)])
def test_heads_apart(device, dtype, heads, kv_heads, width):
    compare_apart(heads, kv_heads, inputs(2, 5, heads, kv_heads, width, dtype, device))


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("cotangent", ["expanded", "spread", "transposed"])
def test_layouts_of_heads_apart(device, layout, cotangent):
    qkv, cos, sin = inputs(3, 5, 2, 1, 6, device=device)
    cos, sin = laid_out(cos, "spread"), laid_out(sin, "sliced")
    compare_apart(2, 1, [laid_out(qkv, layout), cos, sin], cotangent=cotangent)


@pytest.mark.parametrize("width", [6, 64])
def test_gradients_as_attention_leaves_them(device, width):
    """Memory ``[B, H, N, d]``, and of keys another than of values; the bits are those of rows."""
    qkv, cos, sin = inputs(2, 7, 3, 2, width, torch.bfloat16, device, tables=torch.float32)
    heads = apart(3, 2)(qkv.requires_grad_(), cos, sin)
    grads = [randn(*x.shape, dtype=x.dtype, device=device, seed=i) for i, x in enumerate(heads)]
    (expected,) = torch.autograd.grad(
        fused(3, 2)(qkv, cos, sin), qkv, torch.cat(grads, 2).flatten(2)
    )
    strided = [grads[0].transpose(1, 2).contiguous().transpose(1, 2), laid_out(grads[1], "sliced")]
    (got,) = torch.autograd.grad(heads, qkv, [*strided, grads[2]])
    assert got.is_contiguous() and torch.equal(got, expected)


@pytest.mark.parametrize("wanted", [x for x in product((False, True), repeat=3) if any(x)])
def test_heads_without_a_gradient(device, wanted):
    """What nobody used has a gradient of zero."""
    qkv, cos, sin = inputs(2, 5, 3, 2, 8, torch.bfloat16, device)
    heads = apart(3, 2)(qkv.requires_grad_(), cos, sin)
    grads = [w * randn(*x.shape).to(x) for x, w in zip(heads, wanted, strict=True)]
    (expected,) = torch.autograd.grad(heads, qkv, grads, retain_graph=True)
    used = [i for i, w in enumerate(wanted) if w]
    some = [[x[i] for i in used] for x in (heads, grads)]
    (got,) = torch.autograd.grad(some[0], qkv, some[1])
    assert torch.equal(got, expected)


def test_heads_of_a_frozen_projection(device):
    heads = apart(3, 2)(*inputs(2, 5, 3, 2, 8, device=device))
    assert not any(x.requires_grad for x in heads)


def test_heads_apart_are_those_of_packed_rows_bit_by_bit(device):
    values = inputs(5, 5, 3, 2, 8, torch.bfloat16, device)
    packed = fused(3, 2)(*values)
    for _ in range(repeats(device)):
        assert torch.equal(torch.cat(apart(3, 2)(*values), dim=2).flatten(2), packed)
