"""``rope.cu`` run on the host, judged by the reference in fp64."""

import pytest
import torch
from torch import Tensor

from blip3o_fast import reference
from tests.csrc.interface import Kernels
from tests.csrc.test_sandwich_norm import PAIRS
from tests.kernels.oracle import check, judge, laid_out, randn

HEADS = [(12, 4, 64), (3, 0, 16), (0, 2, 16), (2, 1, 6), (1, 1, 2)]


def tables(N: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Halves that differ, as in the published layout."""
    angle = randn(N, d, seed=5, scale=3.0)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize(("H", "K", "d"), HEADS)
@pytest.mark.parametrize(("dtype", "param"), PAIRS)
def test_numbers(
    kernels: Kernels, H: int, K: int, d: int, dtype: torch.dtype, param: torch.dtype
) -> None:
    qkv = randn(2, 5, (H + 2 * K) * d, dtype=dtype)
    check(
        lambda *t: kernels.rope(*t, H, K),
        lambda *t: reference.rope(*t, H, K),
        (qkv, *tables(5, d, param)),
        differentiable=(0,),
    )


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "halves"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    qkv = laid_out(randn(3, 5, 4 * 32, dtype=torch.bfloat16), layout)
    check(
        lambda *t: kernels.rope(*t, 2, 1),
        lambda *t: reference.rope(*t, 2, 1),
        (qkv, *tables(5, 32, torch.float32)),
        differentiable=(0,),
        cotangent=layout,
    )


def test_the_adjoint_is_the_transposed_map(kernels: Kernels) -> None:
    """<rope(x), y> = <x, adjoint(y)> for tables that are no rotation."""
    x, y = randn(1, 3, 48, seed=1), randn(1, 3, 48, seed=2)
    x.requires_grad_()
    cos, sin = tables(3, 16, torch.float32)
    out = kernels.rope(x, cos, sin, 1, 1)
    (pulled,) = torch.autograd.grad(out, x, y)
    left, right = (out.double() * y).sum(), (x.double() * pulled).sum()
    judge("inner product", left.float(), left.float(), right)


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)])
def test_empty(kernels: Kernels, shape: tuple[int, ...]) -> None:
    qkv = torch.empty(shape)
    assert kernels.rope(qkv, *tables(shape[1], 16, torch.float32), 2, 1).shape == shape
