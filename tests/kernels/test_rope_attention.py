"""Rotation and attention in inference, as one kernel and as two, against the fp64 reference."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import ops, reference
from blip3o_fast.ops import _dispatch
from tests.kernels.oracle import judge, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON

d = 64
HALVES = (torch.bfloat16, torch.float16)


def inputs(B, N, H, K, dtype, device):
    """A packed projection and tables whose halves differ, as in the published layout."""
    tables = (randn(N, d, device=device, seed=seed) for seed in (1, 2))
    return randn(B, N, (H + 2 * K) * d, dtype=dtype, device=device), *tables


def kept(B, M, K, dtype, device):
    return tuple(randn(B, M, K, d, dtype=dtype, device=device, seed=seed) for seed in (3, 4))


class Recorded(TorchDispatchMode):
    """Names of the operators inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def expected(qkv, cos, sin, H, K, keys_values=None):
    turned = reference.rope(qkv, cos, sin, H, K).unflatten(-1, (-1, d))
    q, k, v = (turned, *keys_values) if keys_values else turned.split((H, K, K), dim=2)
    return reference.attention(q, k, v).flatten(2)


def compare(qkv, cos, sin, H, K, keys_values=None):
    options = {"num_heads": H, "num_kv_heads": K, "kept": keys_values, "impl": IMPL}
    ours = ops.rope_attention(qkv, cos, sin, **options)
    wide = keys_values and tuple(x.double() for x in keys_values)
    truth = expected(qkv.double(), cos.double(), sin.double(), H, K, wide)
    judge("output", ours, expected(qkv, cos, sin, H, K, keys_values), truth)
    return ours


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("N", [1, 63, 65])
def test_self_attention(device, dtype, N):
    compare(*inputs(2, N, 3, 1, dtype, device), 3, 1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("N, M", [(1, 5), (17, 1), (5, 66)])
def test_cross_attention(device, dtype, N, M):
    compare(*inputs(2, N, 4, 0, dtype, device), 4, 0, kept(2, M, 2, dtype, device))


@pytest.mark.slow
def test_published_size(device):
    """One sample of one layer of base, 257 tokens."""
    compare(*inputs(1, 257, 12, 4, torch.bfloat16, device), 12, 4)


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
def test_layouts(device, layout):
    qkv, cos, sin = inputs(3, 5, 2, 1, torch.bfloat16, device)
    cos, sin = laid_out(cos, "spread"), laid_out(sin, "sliced")
    compare(laid_out(qkv, layout), cos, sin, 2, 1)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "spread"])
def test_layouts_of_what_is_kept(device, layout):
    values = tuple(laid_out(x, layout) for x in kept(3, 5, 1, torch.float16, device))
    compare(*inputs(3, 5, 2, 0, torch.float16, device), 2, 0, values)


def test_tables_in_16_bits(device):
    qkv, cos, sin = inputs(1, 9, 2, 1, torch.bfloat16, device)
    compare(qkv, cos.bfloat16(), sin.bfloat16(), 2, 1)


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_empty(device, batch, tokens):
    qkv, cos, sin = inputs(batch, tokens, 2, 1, torch.bfloat16, device)
    keys_values = kept(batch, 3, 1, torch.bfloat16, device)
    whole = ops.rope_attention(qkv, cos, sin, num_heads=2, num_kv_heads=1, impl=IMPL)
    queries = qkv[..., : 2 * d]
    options = {"num_heads": 2, "num_kv_heads": 0, "kept": keys_values, "impl": IMPL}
    crossed = ops.rope_attention(queries, cos, sin, **options)
    assert whole.shape == crossed.shape == (batch, tokens, 2 * d)


def test_bitwise_repeatable_and_batch_invariant(device):
    qkv, cos, sin = inputs(3, 9, 3, 1, torch.bfloat16, device)
    options = {"num_heads": 3, "num_kv_heads": 1, "impl": IMPL}
    first = ops.rope_attention(qkv, cos, sin, **options)
    again = [ops.rope_attention(qkv, cos, sin, **options) for _ in range(repeats(device))]
    assert all(torch.equal(x, first) for x in again)
    assert torch.equal(ops.rope_attention(qkv[1:2], cos, sin, **options), first[1:2])


def test_unasked_it_is_two_kernels(device, monkeypatch):
    """The one kernel runs only where it was measured faster, also where Triton is not installed."""
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    qkv, cos, sin = inputs(1, 9, 2, 1, torch.bfloat16, device)
    with torch.no_grad():
        q, k, v = (
            ops.rope(qkv, cos, sin, num_heads=2, num_kv_heads=1)
            .unflatten(-1, (4, d))
            .split((2, 1, 1), dim=2)
        )
        two = ops.attention(q, k, v).flatten(2)
        assert torch.equal(ops.rope_attention(qkv, cos, sin, num_heads=2, num_kv_heads=1), two)


def test_gradients_go_through_two_kernels(device):
    qkv, cos, sin = inputs(1, 5, 2, 1, torch.float32, device)
    qkv.requires_grad_()
    options = {"num_heads": 2, "num_kv_heads": 1}
    upstream = randn(1, 5, 2 * d, device=device, seed=9)
    (ours,) = torch.autograd.grad(ops.rope_attention(qkv, cos, sin, **options), qkv, upstream)
    (same,) = torch.autograd.grad(expected(qkv, cos, sin, 2, 1), qkv, upstream)
    torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("crossed", [False, True])
def test_nothing_joins_the_gradients_of_queries_keys_and_values(device, crossed):
    """The backward pass of the rotation reads them where attention left them."""
    qkv, cos, sin = inputs(1, 5, 2, 0 if crossed else 1, torch.float32, device)
    keys_values = kept(1, 5, 1, torch.float32, device) if crossed else None
    options = {"num_heads": 2, "num_kv_heads": 0 if crossed else 1, "kept": keys_values}
    out = ops.rope_attention(qkv.requires_grad_(), cos, sin, **options, rope_impl=IMPL)
    with Recorded() as recorded:
        out.sum().backward()
    assert sum(name.endswith("::rope_backward") for name in recorded.names) == 1
    assert not {"aten::cat", "aten::stack"}.intersection(recorded.names)
    assert qkv.grad.is_contiguous()


def test_what_the_one_kernel_cannot_do_is_said(device):
    if IMPL is not ops.Impl.CUDA:
        pytest.skip("about the one kernel")
    options = {"num_heads": 2, "num_kv_heads": 1, "impl": IMPL}
    qkv, cos, sin = inputs(1, 5, 2, 1, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"tensor cores take float16 and bfloat16"):
        ops.rope_attention(qkv.float(), cos, sin, **options)
    with pytest.raises(ValueError, match=r"no backward: expected torch\.no_grad\(\)"):
        ops.rope_attention(qkv.clone().requires_grad_(), cos, sin, **options)
    with pytest.raises(ValueError, match=r"heads of 64, got 32"):
        ops.rope_attention(qkv[..., :128], cos[:, :32], sin[:, :32], **options)
    none = tuple(x[:, :0] for x in kept(1, 5, 1, torch.bfloat16, device))
    with pytest.raises(ValueError, match=r"at least one key"):
        ops.rope_attention(qkv[..., : 2 * d], cos, sin, **{**options, "num_kv_heads": 0}, kept=none)


def test_keys_are_in_one_place(device):
    qkv, cos, sin = inputs(1, 5, 2, 1, torch.bfloat16, device)
    both = kept(1, 5, 1, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"not in both, got 1 key heads and kept=given"):
        ops.rope_attention(qkv, cos, sin, num_heads=2, num_kv_heads=1, kept=both, impl=IMPL)
    with pytest.raises(ValueError, match=r"got 0 key heads and kept=None"):
        ops.rope_attention(qkv[..., : 2 * d], cos, sin, num_heads=2, num_kv_heads=0, impl=IMPL)
