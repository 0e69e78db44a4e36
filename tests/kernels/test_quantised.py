"""Kernels that write e4m3: their own fp32 rows, quantised as the reference does, bit by bit."""

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import judge, laid_out, randn

TRITON = ops.Impl.TRITON
EPS = 1e-6

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def modulation(batch, width, device, seed=5, dtype=torch.float32):
    shift, scale = randn(batch, 2 * width, device=device, seed=seed, dtype=dtype).chunk(2, dim=-1)
    w1, w2 = (randn(width, device=device, seed=seed + i, dtype=dtype, offset=1) for i in (1, 2))
    return ops.Modulation(w1, w2, shift, scale)


def norm(x):
    m = modulation(x.shape[0], x.shape[-1], x.device, dtype=x.dtype)
    return ops.sandwich_norm_quantised(x, *m, eps=EPS, impl=TRITON), (
        lambda x: ops.sandwich_norm(x, *m, eps=EPS, impl=TRITON),
        lambda x: reference.sandwich_norm(x, *_like(m, x), EPS),
    )


def join(x, post=True):
    B, _, D = x.shape
    pre = modulation(B, D, x.device, dtype=x.dtype)
    closing = modulation(B, D, x.device, 9, x.dtype) if post else None
    y, ls = randn(*x.shape, device=x.device, seed=3, dtype=x.dtype), pre.w1 if post else None
    stream, h = ops.sandwich_join_quantised(x, y, ls, closing, pre, eps=EPS, impl=TRITON)
    plain = ops.sandwich_join(x, y, ls, closing, pre, eps=EPS, impl=TRITON)
    torch.testing.assert_close(stream, plain[0], rtol=0, atol=0, equal_nan=True)

    def true(x):
        given = (None if u is None else u.to(x.dtype) for u in (y, ls))
        norms = (None if m is None else ops.Modulation(*_like(m, x)) for m in (closing, pre))
        return reference.sandwich_join(x, *given, *norms, EPS)[1]

    return h, (lambda x: plain[1], true)


def prenorm_join(x):
    return join(x, post=False)


def swiglu(x):
    gate_up = torch.cat((x, x.flip(-1)), dim=-1)
    return ops.swiglu_quantised(gate_up, impl=TRITON), (
        lambda x: ops.swiglu(gate_up, impl=TRITON),
        lambda x: reference.swiglu(gate_up.to(x.dtype)),
    )


def _like(m, x):
    return (u.to(x.dtype) for u in m)


every = pytest.mark.parametrize("op", [norm, join, prenorm_join, swiglu])


def assert_same(got, expected):
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert got.values.is_contiguous() and got.scales.is_contiguous()


@every
@pytest.mark.parametrize("width", [1, 7, 123, 768])
def test_rows_are_those_of_fp32(device, op, width):
    x = randn(2, 2, width, device=device, scale=3)
    got, (plain, _) = op(x)
    assert_same(got, ops.quantise_rows(plain(x)))


@every
def test_tokens(device, op):
    x = randn(2, 17, 16, device=device)
    got, (plain, _) = op(x)
    assert_same(got, ops.quantise_rows(plain(x)))


@pytest.mark.parametrize("width", [2049, 4100])
def test_wide_rows_of_swiglu(device, width):
    x = randn(1, 3, width, device=device)
    got, (plain, _) = swiglu(x)
    assert_same(got, ops.quantise_rows(plain(x)))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(device, op, dtype):
    """Against fp64, no worse than twice the reference, which rounds before it quantises."""
    x = randn(2, 3, 96, device=device, dtype=dtype)
    got, (_, true) = op(x)
    same = ops.quantise_rows(true(x))
    judge("rows", restored(got), restored(same), true(x.double()))


def restored(x):
    return x.values.float() * x.scales


@every
@pytest.mark.parametrize("layout", ["sliced", "spread", "transposed", "expanded"])
def test_layouts(device, op, layout):
    x = laid_out(randn(3, 2, 14, device=device), layout)
    assert_same(op(x)[0], op(x.contiguous())[0])


@every
def test_a_row_that_is_not_a_number(device, op):
    x = randn(1, 4, 24, device=device)
    expected = op(x)[0]
    x[0, 1, 3] = torch.nan
    got = restored(op(x)[0])
    assert got[0, 1].isnan().all()
    sound = got.isfinite().all(-1)
    assert sound.sum() == 3
    assert torch.equal(got[sound], restored(expected)[sound])


def test_a_row_of_zeros(device):
    got = ops.swiglu_quantised(torch.zeros(2, 3, 32, device=device), impl=TRITON)
    assert_same(got, ops.quantise_rows(torch.zeros(2, 3, 16, device=device)))


@every
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing(device, op, shape):
    got = op(torch.zeros(shape, device=device))[0]
    assert got.values.shape == shape and got.scales.shape == (*shape[:-1], 1)


@every
def test_repeatable(device, op):
    x = randn(2, 4, 48, device=device, dtype=torch.bfloat16)
    first = op(x)[0]
    for _ in range(3):
        assert_same(op(x)[0], first)


def test_a_sample_does_not_depend_on_its_batch(device):
    x = randn(8, 33, 96, device=device, dtype=torch.bfloat16)
    whole = ops.swiglu_quantised(x, impl=TRITON)
    one = ops.swiglu_quantised(x[5:6], impl=TRITON)
    assert_same(one, ops.Quantised(whole.values[5:6], whole.scales[5:6]))
