"""Rows of e4m3: every code, rounding, the range, and what is not a number."""

import pytest
import torch

from blip3o_fast.ops import quantise_rows
from tests.kernels.oracle import laid_out, randn

NAN = 0x7F
LARGEST = 0x7E
TINY = torch.finfo(torch.float32).tiny


def numbers():
    """The 127 numbers of at least zero, by their code: 4 bits of exponent, 3 of mantissa."""
    codes = torch.arange(NAN, dtype=torch.float64)
    exponent, mantissa = codes // 8, codes % 8
    normal = 2 ** (exponent - 7) * (1 + mantissa / 8)
    return torch.where(exponent > 0, normal, 2.0**-6 * mantissa / 8)


def nearest(q):
    """Codes of fp64 numbers: the nearest, ties to the even code, at most the largest."""
    table, magnitude = numbers(), q.abs()
    low = (torch.searchsorted(table, magnitude, right=True) - 1).clamp(max=LARGEST)
    high = (low + 1).clamp(max=LARGEST)
    below, above = magnitude - table[low], table[high] - magnitude
    up = (above < below) | ((above == below) & (low % 2 == 1))
    return torch.where(up, high, low) + torch.where(q.signbit(), 128, 0)


def codes(x):
    return x.values.view(torch.uint8).long()


def restored(x):
    return x.values.double() * x.scales.double()


def test_the_table_is_that_of_torch():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = numbers()
    assert torch.equal(every[:NAN], table) and torch.equal(every[128 : 128 + NAN], -table)
    assert every[[NAN, 128 + NAN]].isnan().all() and table[-1] == 448


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**100, 0.3, 7e-5, 1e30])
def test_every_code_comes_back(scale):
    table = numbers()
    x = (torch.cat((table, -table)) * scale).float()
    got = quantise_rows(x[None])
    assert torch.equal(codes(got)[0], torch.cat((torch.arange(NAN), 128 + torch.arange(NAN))))
    # Rounded to fp32 otherwise: the number, the largest of its row, and the scale.
    limit = 0 if scale in (1.0, 2.0**-40, 2.0**100) else 3 * 2.0**-24
    torch.testing.assert_close(restored(got)[0], x.double(), rtol=limit, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounds_to_the_nearest(dtype):
    """From 448 down to below the smallest: the code of the fp32 quotient, found by hand in fp64."""
    exponent = randn(64, 257, seed=1, dtype=torch.float64) * 6
    x = (randn(64, 257) * 2**exponent).clamp(-6e4, 6e4).to(dtype)
    got = quantise_rows(x)
    wide = x.float()
    scales = wide.abs().amax(1, keepdim=True) / 448
    assert torch.equal(got.scales, scales)
    assert torch.equal(codes(got), nearest((wide * (1 / scales)).double()))
    half = torch.maximum(wide.double().abs() / 16, scales.double() * 2.0**-10)
    assert ((restored(got) - wide.double()).abs() <= half * (1 + 1e-6)).all()


def test_ties_go_to_the_even_code():
    table = numbers()
    middles = (table[1:] + table[:-1]) / 2
    got = codes(quantise_rows(torch.cat((middles, -middles, table[-1:])).float()[None]))[0]
    even = torch.arange(LARGEST) + torch.arange(LARGEST) % 2
    assert torch.equal(got, torch.cat((even, even + 128, torch.tensor([LARGEST]))))


def test_the_largest_of_a_row_becomes_448():
    """Even where two roundings of fp32 carry it past that; the error of its scale is 2^-24."""
    power = torch.linspace(-117, 127.99, 100_001, dtype=torch.float64)
    x = torch.stack((2**power, -(2**power)), dim=1).float()
    got = quantise_rows(x)
    assert (x[:, 0] * (1 / got.scales[:, 0]) > 448).any()
    assert (codes(got) == torch.tensor([LARGEST, LARGEST + 128])).all()
    torch.testing.assert_close(restored(got), x.double(), rtol=2.0**-24, atol=0)


def test_rows_of_nothing_and_of_next_to_nothing():
    x = torch.tensor([[0.0, -0.0], [1e-45, 0.0], [448 * TINY, TINY], [447 * TINY, -TINY]])
    got = quantise_rows(x)
    assert torch.equal(got.scales, torch.full((4, 1), TINY))
    assert torch.equal(codes(got)[:2], torch.tensor([[0, 128], [0, 0]]))
    assert torch.equal(restored(got)[2], x[2].double())
    assert torch.equal(restored(got)[3], torch.tensor([448, -1.0]).double() * TINY)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(bad):
    x = randn(3, 5)
    x[1, 2] = bad
    got = restored(quantise_rows(x))
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], restored(quantise_rows(x[[0, 2]])))


@pytest.mark.parametrize("layout", ["sliced", "spread", "transposed", "expanded"])
def test_layouts(layout):
    x = laid_out(randn(3, 5, 7), layout)
    got, expected = quantise_rows(x), quantise_rows(x.contiguous())
    assert torch.equal(codes(got), codes(expected)) and torch.equal(got.scales, expected.scales)


def test_no_rows():
    got = quantise_rows(torch.zeros(0, 4, 6))
    assert got.values.shape == (0, 4, 6) and got.scales.shape == (0, 4, 1)
