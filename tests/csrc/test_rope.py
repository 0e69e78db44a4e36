"""``rope.cu`` run on the host, judged by the reference in fp64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from blip3o_fast.ops import OPS
from tests.csrc.interface import Kernels
from tests.csrc.test_sandwich_norm import PAIRS
from tests.kernels.oracle import check, judge, laid_out, randn

HEADS = [(12, 4, 64), (3, 0, 16), (0, 2, 16), (2, 1, 6), (1, 1, 2)]


def tables(N: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Halves that differ, as in the published layout."""
    angle = randn(N, d, seed=5, scale=3.0)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def compare(kernels: Kernels, values: Sequence[Tensor], *counts: int, **options: str) -> None:
    def ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        return kernels.rope(*tensors, *counts)[: 3 if counts[1] else 1]

    def expected(*tensors: Tensor) -> tuple[Tensor, ...]:
        return OPS["rope"].reference(*tensors, *counts)

    check(ours, expected, values, differentiable=(0,), **options)


@pytest.mark.parametrize(("H", "K", "d"), HEADS)
@pytest.mark.parametrize(("dtype", "param"), PAIRS)
def test_numbers(
    kernels: Kernels, H: int, K: int, d: int, dtype: torch.dtype, param: torch.dtype
) -> None:
    """Queries, keys and values apart, and all heads in one."""
    values = (randn(2, 5, (H + 2 * K) * d, dtype=dtype), *tables(5, d, param))
    compare(kernels, values, H, K, H + K)
    compare(kernels, values, H + 2 * K, 0, H + K)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "halves"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    qkv = laid_out(randn(3, 5, 4 * 32, dtype=torch.bfloat16), layout)
    for counts in ((2, 1, 3), (4, 0, 3)):
        compare(kernels, (qkv, *tables(5, 32, torch.float32)), *counts, cotangent=layout)


def test_the_adjoint_is_the_transposed_map(kernels: Kernels) -> None:
    """<rope(x), y> = <x, adjoint(y)> for tables that are no rotation."""
    x, y = randn(1, 3, 48, seed=1), randn(1, 3, 48, seed=2)
    x.requires_grad_()
    cos, sin = tables(3, 16, torch.float32)
    out = torch.cat(kernels.rope(x, cos, sin, 1, 1, 2), dim=2).flatten(2)
    (pulled,) = torch.autograd.grad(out, x, y)
    left, right = (out.double() * y).sum(), (x.double() * pulled).sum()
    judge("inner product", left.float(), left.float(), right)


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)])
def test_empty(kernels: Kernels, shape: tuple[int, ...]) -> None:
    qkv = torch.empty(shape)
    q, k, v = kernels.rope(qkv, *tables(shape[1], 16, torch.float32), 2, 1, 3)
    assert q.shape == (*shape[:2], 2, 16) and k.shape == v.shape == (*shape[:2], 1, 16)
