"""``sandwich_norm.cu`` run on the host, judged by the reference in fp64."""

import pytest
import torch
from torch import Tensor

from blip3o_fast import reference
from tests.csrc.interface import Kernels
from tests.kernels.oracle import check, laid_out, randn

EPS = 1e-6
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def spec(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return reference.sandwich_norm(x, w1, w2, shift, scale, EPS)


def operands(
    B: int, N: int, D: int, dtype: torch.dtype, param: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = randn(B, N, D, dtype=dtype, scale=2.0, offset=0.3)
    w1, w2 = (randn(D, dtype=param, seed=i, scale=0.3, offset=1.0) for i in (1, 2))
    both = randn(B, 2 * D, dtype=param, seed=3, scale=0.5)
    shift, scale = both.chunk(2, dim=-1)  # strided, as AdaLN gives them
    return x, w1, w2, shift, scale


# Widths: one warp with idle lanes, three warps, a width that no 16-byte access fits, the widest.
@pytest.mark.parametrize("width", [8, 123, 768, 1000, 3072])
@pytest.mark.parametrize(("dtype", "param"), PAIRS)
def test_numbers(kernels: Kernels, width: int, dtype: torch.dtype, param: torch.dtype) -> None:
    tokens = 19 if width < 1000 else 3
    inputs = operands(2, tokens, width, dtype, param)

    def ours(*tensors: Tensor) -> Tensor:
        return kernels.sandwich_norm(*tensors, eps=EPS)

    check(ours, spec, inputs)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 65])
def test_token_tails(kernels: Kernels, tokens: int) -> None:
    """Units of rows end inside a sample; blocks end inside the units."""
    inputs = operands(3, tokens, 64, torch.bfloat16, torch.bfloat16)
    check(lambda *t: kernels.sandwich_norm(*t, eps=EPS), spec, inputs)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "halves"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    x, *site = operands(3, 5, 96, torch.bfloat16, torch.bfloat16)
    x = laid_out(x, layout)
    check(lambda *t: kernels.sandwich_norm(*t, eps=EPS), spec, (x, *site), cotangent=layout)


def test_aligned_and_scalar_paths_agree_bitwise(kernels: Kernels) -> None:
    """Which thread adds what does not depend on alignment."""
    x, *site = operands(2, 5, 768, torch.bfloat16, torch.bfloat16)
    h = kernels.sandwich_norm(x, *site)
    assert torch.equal(h, kernels.sandwich_norm(laid_out(x, "sliced"), *site))


def test_rows_do_not_depend_on_the_batch(kernels: Kernels) -> None:
    x, w1, w2, shift, scale = operands(4, 6, 384, torch.float32, torch.float32)
    h = kernels.sandwich_norm(x, w1, w2, shift, scale)
    alone = kernels.sandwich_norm(x[2:3, 3:4], w1, w2, shift[2:3], scale[2:3])
    assert torch.equal(h[2:3, 3:4], alone)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_empty(kernels: Kernels, batch: int, tokens: int) -> None:
    inputs = [u.requires_grad_() for u in operands(batch, tokens, 64, *PAIRS[1])]
    h = kernels.sandwich_norm(*inputs)
    assert h.shape == (batch, tokens, 64)
    for gradient in torch.autograd.grad(h.sum(), inputs):
        assert not gradient.any()


def test_width_without_a_kernel_is_refused(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        kernels.sandwich_norm(*operands(1, 1, 3073, torch.float32, torch.float32))
