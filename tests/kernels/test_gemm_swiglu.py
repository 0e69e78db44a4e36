"""The gate-up product with SwiGLU in its epilogue against the fp64 reference."""

import pytest
import torch
import torch.nn.functional as F

from blip3o_fast import ops, reference
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import Impl
from blip3o_fast.ops.gemm_swiglu import GEMM_SWIGLU, TILES
from tests.kernels.oracle import check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def runs_here(device):
    if reason := GEMM_SWIGLU.triton(torch.empty(0, dtype=torch.bfloat16, device=device)):
        pytest.skip(reason)


def inputs(batch, tokens, width, inner, device="cpu", dtype=torch.bfloat16):
    x = randn(batch, tokens, width, dtype=dtype, device=device, seed=1)
    return x, randn(2 * inner, width, dtype=dtype, device=device, scale=width**-0.5)


def fused(x, weight):
    return ops.gemm_swiglu(x, weight, impl=Impl.TRITON)


def judge(call, x, weight):
    check(call, reference.gemm_swiglu, [x, weight], differentiable=[])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 8, 8), (2, 33, 72, 72), (1, 257, 8, 16)],
    ids=["one row", "no full tile", "257 tokens"],
)
def test_shapes(device, dtype, shape):
    judge(fused, *inputs(*shape, device, dtype))


@pytest.mark.parametrize("tile", range(TILES))
def test_every_tile(device, tile):
    """Several tiles each way, the last nearly empty, and a step that ends within the rows."""
    x, weight = inputs(1, 130, 72, 136, device)
    found = []

    def call(x, weight):
        found.append(GEMM_SWIGLU(x, weight, tile, impl=Impl.TRITON))
        return found[-1]

    judge(call, x, weight)
    # Equal bits again, though other rows are beside the last ones.
    assert torch.equal(call(x[:, 128:], weight), found[0][:, 128:])


@pytest.mark.parametrize("layout", ["sliced", "spread", "transposed", "expanded", "halves"])
def test_layouts(device, layout):
    x, weight = inputs(2, 3, 24, 8, device)
    judge(fused, laid_out(x, layout), weight)
    judge(fused, x, laid_out(weight, layout))


def test_every_run_gives_equal_bits(device):
    tensors = inputs(2, 33, 24, 24, device)
    first = fused(*tensors)
    assert all(torch.equal(fused(*tensors), first) for _ in range(repeats(device)))


@pytest.mark.parametrize("batch, inner", [(0, 8), (1, 0)])
def test_nothing_to_compute(device, batch, inner):
    assert fused(*inputs(batch, 3, 8, inner, device)).shape == (batch, 3, inner)


def test_it_rounds_less_than_two_kernels(device):
    """Two kernels round gate and up before they are multiplied."""
    x, weight = inputs(1, 64, 64, 64, device)
    truth = reference.gemm_swiglu(x.double(), weight.double())
    two = ops.gemm_swiglu(x, weight, impl=Impl.REFERENCE, swiglu_impl=Impl.TRITON)
    errors = [float((u.double() - truth).norm() / truth.norm()) for u in (fused(x, weight), two)]
    assert errors[0] < 0.7 * errors[1]


def test_two_kernels_run_unless_one_is_asked_for(device):
    x, weight = (u.requires_grad_() for u in inputs(1, 3, 8, 8, device))
    two = ops.gemm_swiglu(x, weight)
    assert torch.equal(two, ops.swiglu(F.linear(x, weight)))
    assert all(g.any() for g in torch.autograd.grad(two.sum(), (x, weight)))


@pytest.mark.parametrize(
    "shape, message",
    [((1, 3, 12, 8), "multiples of 8 as D and I"), ((1, 3, 8, 12), r"of \[24, 8\]; pass impl=")],
)
def test_what_tma_cannot_move_is_refused(device, shape, message):
    with pytest.raises(ValueError, match=message):
        fused(*inputs(*shape, device))


def test_what_the_kernel_cannot_do_is_refused(device):
    x, weight = inputs(1, 3, 8, 8, device)
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16; pass impl=Impl\.REF"):
        fused(x.float(), weight.float())
    with pytest.raises(ValueError, match=r"has no backward: expected torch\.no_grad"):
        fused(x.requires_grad_(), weight)
    with pytest.raises(ValueError, match=r"expected torch\.bfloat16, the dtype of x, got "):
        fused(x.detach(), weight.half())


def test_the_tile_is_chosen_by_arithmetic():
    """One sample cannot fill an H100 with large tiles, 64 can."""
    from blip3o_kernels.gemm_swiglu import TILES as tiles
    from blip3o_kernels.gemm_swiglu import choose_tile

    assert len(tiles) == TILES
    inner = Shape("base").config.intermediate_size
    chosen = [choose_tile(256 * batch, inner, 132) for batch in (1, 2, 64)]
    assert chosen == [tiles[2], tiles[1], tiles[0]]
    for tile in tiles:
        stages = tile.stages * (tile.rows + 2 * tile.columns) * 64
        assert 2 * (stages + tile.rows * tile.columns) <= 227 * 1024
        assert tile.rows * 2 * tile.columns <= 128 * 32 * tile.warps  # sums, of 255 registers
