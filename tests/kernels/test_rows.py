"""How rows are cut, and the approximation of the GELU."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from blip3o_kernels.arithmetic import gelu, gelu_slope  # noqa: E402
from blip3o_kernels.launch import (  # noqa: E402
    MAX_WIDTH,
    MULTIPROCESSORS,
    summed_launch,
    whole_waves,
)

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are called on the CPU, interpreted"
)


def launched(width, columns, samples=64, tokens=256, registers=2.5):
    return whole_waves(torch.empty(samples, tokens, width, device="meta"), columns, registers)


@pytest.mark.parametrize("columns", [16, 24, 32])
@pytest.mark.parametrize("width", [1, 7, 64, 100, 773, 1500, 1877, 3541, MAX_WIDTH])
def test_pieces_cover_a_row(width, columns):
    """Pieces are powers of two, in order, without a gap; equal ones are neighbours."""
    cut = launched(width, columns)[0].cut
    sizes = [size for _, size in cut]
    assert [first for first, _ in cut] == [sum(sizes[:k]) for k in range(len(cut))]
    assert sum(sizes[:-1]) < width <= sum(sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("columns", [16, 24, 32])
@pytest.mark.parametrize("width", [768, 1024, 1408, 1536, 1920, 2048, 3072, 3584])
def test_no_thread_is_idle(width, columns):
    """At the widths of models and of the padded adapter, pieces are exact."""
    launch, _ = launched(width, columns)
    assert sum(size for _, size in launch.cut) == width
    threads = 32 * launch.num_warps // launch.tile
    assert min(size for _, size in launch.cut) >= threads


@pytest.mark.parametrize("samples, tokens", [(1, 1), (2, 3), (64, 256), (256, 256), (1, 16384)])
def test_programs_walk_every_token(samples, tokens):
    """Chunks cover a sample, hold whole tiles, and registers suffice for at least one program."""
    for width in (8, 768, 2048, 3584, MAX_WIDTH):
        launch, registers = launched(width, 24, samples, tokens, 8.8)
        chunks = -(-tokens // launch.rows)
        assert launch.rows % launch.tile == 0 and (chunks - 1) * launch.rows < tokens
        assert 32 <= registers <= 255
        assert registers * 32 * launch.num_warps <= 65536


@pytest.mark.parametrize("columns, depth", [(24, 4), (12, 2)])
@pytest.mark.parametrize("samples, tokens", [(1, 1), (2, 3), (64, 256), (256, 256), (1, 16384)])
def test_a_backward_pass_of_a_norm_walks_every_token(samples, tokens, columns, depth):
    """Chunks cover a sample and hold whole tiles; at 16k rows each multiprocessor has a program."""
    for width in (8, 768, 1024, 2048, 3584, MAX_WIDTH):
        x = torch.empty(samples, tokens, width, device="meta")
        launch, deep = summed_launch(x, columns, depth)
        chunks = -(-tokens // launch.rows)
        assert launch.rows % (launch.tile * deep) == 0 and (chunks - 1) * launch.rows < tokens
        if samples * tokens == 16384 and width <= 2048:
            assert 0.9 * MULTIPROCESSORS < samples * chunks <= MULTIPROCESSORS


@pytest.mark.parametrize("width, per_column", [(768, 4.5), (1024, 2.8), (2048, 6.0)])
def test_programs_fill_whole_waves(width, per_column):
    """At 16k rows nearly every slot has a program, and none waits for a second wave."""
    launch, registers = launched(width, 24, registers=per_column)
    programs = 64 * -(-256 // launch.rows)
    slots = 132 * (65536 // (32 * launch.num_warps * registers))
    assert 0.9 * slots < programs <= slots


def test_few_rows_have_a_program_each():
    """A warp has one row while there are fewer rows than the device holds warps of."""
    launch, _ = launched(768, 24, samples=2)
    assert launch.rows == launch.tile == 4


@triton.jit
def _gelus(u, values, slopes, COUNT: tl.constexpr, ROUGH: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(u + at)
    tl.store(values + at, gelu(x, ROUGH))
    tl.store(slopes + at, gelu_slope(x, ROUGH))


@pytest.mark.parametrize(
    "dtype, rough, bound",
    [(torch.float32, False, 1e-6), (torch.float32, True, 1.3e-5), (torch.float64, False, 1e-9)],
)
def test_the_gelu(dtype, rough, bound):
    """Digits are kept far into the tail; fp64 loses some beyond |u| = 4."""
    far = 4.0 if dtype is torch.float64 else 12.0
    u = torch.linspace(-far, far, 4096, dtype=dtype)
    values, slopes = torch.empty_like(u), torch.empty_like(u)
    _gelus[(1,)](u, values, slopes, COUNT=4096, ROUGH=rough)
    u = u.double()
    tail = u.clone().apply_(lambda x: math.erfc(abs(x) / math.sqrt(2)) / 2)
    moment = u.abs() * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    relative = bound + 1e-7 * u.square()
    rounding = torch.finfo(dtype).eps * (u > 0)
    true = u.clamp(min=0) - u.abs() * tail
    assert ((values - true).abs() <= u.abs() * (relative * tail + rounding)).all()
    below = tail - moment
    true = torch.where(u < 0, below, 1 - below)
    assert ((slopes - true).abs() <= relative * (tail + moment) + rounding).all()
