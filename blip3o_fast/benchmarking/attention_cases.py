"""Attention of one layer, by itself and with the rotation before it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking import peers, work
from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import (
    OpSpec,
    has_impl,
    make_contender,
    op_call,
    rope_sizes,
)
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import Impl


def _rope_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, shape: Shape, impl: Impl | None
) -> Tensor:
    H, K = shape.config.num_attention_heads, shape.config.num_key_value_heads
    inplace = impl is not Impl.REFERENCE  # as in the sampler
    return ops.rope_attention(
        qkv, cos, sin, num_heads=H, num_kv_heads=K, impl=impl, inplace=inplace
    )


ROPE_ATTENTION = OpSpec("rope_attention", _rope_attention, rope_sizes, 0, frozenset((1, 2)))
"""Self-attention of one layer with its rotation: by one kernel, or by two of which one is ours."""


def attention_cases(shape: Shape, dtype: str, device: torch.device) -> Iterator[Case]:
    """Attention of one layer by every backend that can run, forward and backward, and with rope."""
    config, size = shape.config, DTYPES[dtype].itemsize
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, N = shape.batch, shape.tokens
    spec = OpSpec(
        "attention", ops.attention, lambda _: [(B, N, H, d), (B, N, K, d), (B, N, K, d)], 3
    )
    sample = spec.tensors(shape, DTYPES[dtype], device)
    runnable = [b for b in ops.AttentionBackend if peers.backend_refusal(b, *sample) is None]
    chosen = ops.attention_backend(*sample)[0]
    for backward in (False, True):
        name = "attention" + (" backward" if backward else "")
        needed = work.attention(config, B, size, backward=backward)
        contenders = [
            _attention_contender(b, spec, shape, dtype, device, backward, ours=b is chosen)
            for b in runnable
        ]
        yield Case(Task("attention", name, shape.name, dtype, needed), tuple(contenders))
    yield _rope_attention_case(shape, dtype, device)


def _rope_attention_case(shape: Shape, dtype: str, device: torch.device) -> Case:
    """One kernel and two. The limit of both is that of attention: it reads all that rope does."""
    where = (DTYPES[dtype], device)
    rope = Impl.TRITON if device.type == "cuda" else Impl.ATEN
    contenders = {"reference": Impl.REFERENCE}
    if has_impl(rope, "rope", *where):
        contenders["rope, then attention"] = rope
    if device.type == "cuda" and has_impl(Impl.CUDA, "rope_attention", *where):
        contenders["one kernel"] = Impl.CUDA
    made = (
        make_contender(
            name,
            op_call(ROPE_ATTENTION, shape, impl),
            impl is not Impl.REFERENCE,
            ROPE_ATTENTION,
            shape,
            dtype,
            device,
            backward=False,
        )
        for name, impl in contenders.items()
    )
    needed = work.attention(shape.config, shape.batch, DTYPES[dtype].itemsize)
    return Case(Task("attention", "rope + attention", shape.name, dtype, needed), tuple(made))


def _attention_contender(
    backend: ops.AttentionBackend,
    spec: OpSpec,
    shape: Shape,
    dtype: str,
    device: torch.device,
    backward: bool,
    *,
    ours: bool,
) -> Contender:
    def call(q: Tensor, k: Tensor, v: Tensor, *, impl: Impl | None = None) -> Tensor:
        wanted = ops.AttentionBackend.REFERENCE if impl is Impl.REFERENCE else backend
        return ops.attention(q, k, v, backend=wanted)

    own = OpSpec(spec.name, call, spec.sizes, spec.differentiable)
    return make_contender(backend.value, call, ours, own, shape, dtype, device, backward)
