"""``sandwich_join.cu`` run on the host, judged by the reference in fp64."""

import pytest
import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.reference import Modulation
from tests.csrc.interface import Kernels
from tests.csrc.test_sandwich_norm import EPS, PAIRS, operands
from tests.kernels.oracle import check, laid_out, randn

PARTS = {"scale": (True, False, False), "post": (False, True, False), "pre": (False, False, True)}


def spec(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    x, y, layer_scale, post, pre = unpacked(tensors)
    joined = reference.sandwich_join(x, y, layer_scale, post, pre, EPS)
    return tuple(u for u in joined if u is not None)


def spec_from_stored(stored: torch.dtype):
    """``spec`` whose h starts from x' as it is stored: that rounding belongs to the contract.

    Gradients of fp32 parameters beside a 16-bit stream differ by far more through it than through
    anything that a kernel does.
    """

    def op(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, y, layer_scale, post, pre = unpacked(tensors)
        x_out, _ = reference.sandwich_join(x, y, layer_scale, post, None, EPS)
        x_out = x_out + (x_out.to(stored).to(x_out.dtype) - x_out).detach()
        return x_out, reference.sandwich_norm(x_out, *pre, EPS)

    return op


def unpacked(tensors: tuple[Tensor | None, ...]) -> tuple:
    x, y, layer_scale, *sites = tensors
    post, pre = (
        Modulation(*part) if part[0] is not None else None for part in (sites[:4], sites[4:])
    )
    return x, y, layer_scale, post, pre


def inputs(
    B: int, N: int, D: int, dtype: torch.dtype, param: torch.dtype, *, parts: str = "scale post pre"
) -> list[Tensor | None]:
    x, *post = operands(B, N, D, dtype, param)
    pre = [u.flip(0) for u in operands(B, N, D, dtype, param)[1:]]
    y = randn(B, N, D, dtype=dtype, seed=11)
    layer_scale = randn(D, dtype=param, seed=12, scale=0.2, offset=0.5)
    absent = [None] * 4
    return [
        x,
        y,
        layer_scale if "scale" in parts else None,
        *(post if "post" in parts else absent),
        *(pre if "pre" in parts else absent),
    ]


def ours(kernels: Kernels):
    def op(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        joined = kernels.sandwich_join(*unpacked(tensors), eps=EPS)
        return tuple(u for u in joined if u is not None)

    return op


@pytest.mark.parametrize("width", [8, 123, 768, 3072])
@pytest.mark.parametrize(("dtype", "param"), PAIRS)
def test_numbers(kernels: Kernels, width: int, dtype: torch.dtype, param: torch.dtype) -> None:
    tokens = 19 if width < 1000 else 3
    check(ours(kernels), spec_from_stored(dtype), inputs(2, tokens, width, dtype, param))


@pytest.mark.parametrize(
    "parts", ["", "scale", "post", "pre", "scale pre", "post pre", "scale post"]
)
@pytest.mark.parametrize(("dtype", "param"), PAIRS[:2])
def test_optional_parts(
    kernels: Kernels, parts: str, dtype: torch.dtype, param: torch.dtype
) -> None:
    check(ours(kernels), spec, inputs(2, 5, 64, dtype, param, parts=parts))


@pytest.mark.parametrize("parts", ["scale post", "pre", "scale post pre"])
def test_turns_of_a_group_of_several_warps(kernels: Kernels, parts: str) -> None:
    """Blocks walk several rows a group, and sums of one turn must not meet those of the next."""
    tensors = inputs(1, 33, 512, torch.bfloat16, torch.bfloat16, parts=parts)
    check(ours(kernels), spec_from_stored(torch.bfloat16) if "pre" in parts else spec, tensors)


@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_is_used(kernels: Kernels, used: int) -> None:
    """The gradient of the other never arrives."""
    tensors = inputs(2, 5, 64, torch.float32, torch.float32)
    check(
        lambda *t: ours(kernels)(*t)[used],
        lambda *t: spec(*t)[used],
        tensors,
        differentiable=(0, 1, 2, 3, 4, 5, 6),
    )


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_strided_rows(kernels: Kernels, layout: str) -> None:
    x, y, *rest = inputs(3, 5, 96, torch.bfloat16, torch.bfloat16)
    tensors = [laid_out(x, layout), laid_out(y, "sliced"), *rest]
    check(ours(kernels), spec, tensors, cotangent=layout)


def test_gradients_over_many_units(kernels: Kernels) -> None:
    """Enough rows that a unit walks more than the fewest, and weights gather several samples."""
    tensors = inputs(40, 257, 8, torch.float32, torch.float32)
    check(ours(kernels), spec, tensors)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (2, 0)])
def test_empty(kernels: Kernels, batch: int, tokens: int) -> None:
    tensors = [u.requires_grad_() for u in inputs(batch, tokens, 64, *PAIRS[1]) if u is not None]
    x, h = ours(kernels)(*tensors)
    for gradient in torch.autograd.grad(x.sum() + h.sum(), tensors):
        assert not gradient.any()
