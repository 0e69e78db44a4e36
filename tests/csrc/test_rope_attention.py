"""``rope_attention.cu`` run on the host, judged by the reference in fp64."""

import pytest
import torch
from torch import Tensor

from blip3o_fast import reference
from tests.csrc.interface import Kernels
from tests.csrc.test_rope import tables
from tests.kernels.oracle import judge, randn

HALVES = [torch.bfloat16, torch.float16]
d = 64


def expected(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, rotates_keys: bool
) -> Tensor:
    q = turned(q, cos, sin)
    return reference.attention(q, turned(k, cos, sin) if rotates_keys else k, v)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = x.shape[2]
    return reference.rope(x.flatten(2), cos.to(x), sin.to(x), heads, 0).view_as(x)


def inputs(
    N: int, M: int, H: int, K: int, dtype: torch.dtype, *, batch: int = 1, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Queries, keys and values as the packed projection of ``H + 2K`` heads holds them."""
    packed = randn(batch, max(N, M), H + 2 * K, d, dtype=dtype, scale=scale)
    q, k, v = packed.split((H, K, K), dim=2)
    return q[:, :N], k[:, :M], v[:, :M], *tables(N, d, torch.float32)


def compare(kernels: Kernels, values: tuple[Tensor, ...], *, rotates_keys: bool) -> Tensor:
    ours = kernels.rope_attention(*values, rotates_keys=rotates_keys)
    truth = expected(*(x.double() for x in values), rotates_keys=rotates_keys)
    judge("output", ours, expected(*values, rotates_keys=rotates_keys), truth)
    return ours


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("N", [1, 16, 63, 64, 65, 130])
def test_self_attention(kernels: Kernels, dtype: torch.dtype, N: int) -> None:
    compare(kernels, inputs(N, N, 3, 1, dtype), rotates_keys=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("N", "M"), [(5, 1), (33, 70), (64, 128), (2, 257)])
def test_keys_that_are_rotated_already(
    kernels: Kernels, dtype: torch.dtype, N: int, M: int
) -> None:
    compare(kernels, inputs(N, M, 2, 2, dtype), rotates_keys=False)


def test_groups_and_samples(kernels: Kernels) -> None:
    """Every head finds the key head that it shares, every sample its own rows."""
    values = inputs(20, 20, 6, 2, torch.bfloat16, batch=2)
    together = compare(kernels, values, rotates_keys=True)
    q, k, v, cos, sin = values
    for head in range(6):
        alone = (q[1:, :, head : head + 1], *(x[1:, :, head // 3][:, :, None] for x in (k, v)))
        one = kernels.rope_attention(*alone, cos, sin, rotates_keys=True)
        assert torch.equal(one[0, :, 0], together[1, :, head])


@pytest.mark.slow
def test_a_query_does_not_depend_on_its_tile(kernels: Kernels) -> None:
    """Tiles of 128 queries, chosen where there are many, give what tiles of 64 give."""
    q, k, v, cos, sin = inputs(128, 3, 1, 1, torch.bfloat16)
    narrow = kernels.rope_attention(q, k, v, cos, sin, rotates_keys=False)
    heads, batch = 4, 66
    many = (x.expand(batch, -1, heads, -1).reshape(batch, -1, heads, d) for x in (q, k, v))
    wide = kernels.rope_attention(*many, cos, sin, rotates_keys=False)
    assert torch.equal(wide, narrow.expand(batch, -1, heads, -1))


def test_logits_beyond_what_exp_can_hold(kernels: Kernels) -> None:
    compare(kernels, inputs(70, 70, 1, 1, torch.bfloat16, scale=40.0), rotates_keys=True)


def test_later_chunks_take_over(kernels: Kernels) -> None:
    """The largest logit is in the last chunk, then in the first."""
    q, k, v, cos, sin = inputs(3, 150, 1, 1, torch.float16)
    ramp = torch.linspace(0.01, 4, 150).to(k)[:, None, None]
    for scale in (ramp, ramp.flip(0)):
        compare(kernels, (q, k * scale, v, cos, sin), rotates_keys=False)


def test_nothing_beyond_the_keys_is_read(kernels: Kernels) -> None:
    """NaN follows the last key and value, and the last query."""
    q, k, v, cos, sin = inputs(9, 9, 1, 1, torch.bfloat16)
    longer = []
    for x in (q, k, v):
        buffer = x.new_full((1, 80, 1, d), torch.nan)
        buffer[:, :9] = x
        longer.append(buffer[:, :9])
    compare(kernels, (*longer, cos, sin), rotates_keys=True)


@pytest.mark.parametrize(("B", "N"), [(0, 5), (2, 0)])
def test_empty(kernels: Kernels, B: int, N: int) -> None:
    q, k = torch.empty(B, N, 2, d, dtype=torch.float16), randn(B, 3, 1, d, dtype=torch.float16)
    out = kernels.rope_attention(q, k, k, *tables(N, d, torch.float32), rotates_keys=False)
    assert out.shape == q.shape


@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 32), (1, 3, 2, 128)], ids=["heads of 32", "heads of 128"]
)
def test_what_has_no_kernel_is_refused(kernels: Kernels, shape: tuple[int, ...]) -> None:
    x = randn(*shape, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        kernels.rope_attention(x, x, x, *tables(3, shape[3], torch.float32), rotates_keys=True)


def test_fp32_is_refused(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        kernels.rope_attention(*inputs(3, 3, 1, 1, torch.float32), rotates_keys=True)
