"""The attention of one layer, alone and after its rotation."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking import peers, work
from blip3o_fast.benchmarking.cases import Case, Task
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import Subject, has_impl, make_contender, sizes_of
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import OPS, Impl


def attention_cases(shape: Shape, dtype: str, device: torch.device) -> Iterator[Case]:
    """Attention by every backend that can run, forward and backward, and rope with attention."""
    config, size = shape.config, DTYPES[dtype].itemsize
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, N = shape.batch, shape.tokens

    def arguments() -> tuple[Tensor, ...]:
        sizes = [(B, N, H, d), (B, N, K, d), (B, N, K, d)]
        return tuple(torch.randn(s, dtype=DTYPES[dtype], device=device) for s in sizes)

    def by(backend: ops.AttentionBackend) -> Callable[..., Tensor]:
        return partial(ops.attention, backend=backend)

    subject = Subject("attention", arguments, by(ops.AttentionBackend.REFERENCE), 3)
    for backward in (False, True):
        name = "attention" + (" backward" if backward else "")
        needed = work.attention(config, B, size, backward=backward)
        sample = [x.requires_grad_(backward) for x in arguments()]
        runnable = [b for b in ops.AttentionBackend if peers.backend_refusal(b, *sample) is None]
        chosen = ops.attention_backend(*sample)[0]
        contenders = [
            make_contender(b.value, by(b), b is chosen, subject, device, backward) for b in runnable
        ]
        yield Case(Task("attention", name, shape.name, dtype, needed), tuple(contenders))
    yield _rope_attention_case(shape, dtype, device)


def _rope_attention_case(shape: Shape, dtype: str, device: torch.device) -> Case:
    """Rope and attention by one kernel and by two. The limit is that of attention alone."""
    where = (DTYPES[dtype], device)
    H, K = shape.config.num_attention_heads, shape.config.num_key_value_heads

    def arguments() -> tuple[Tensor, ...]:
        return OPS["rope"].specimens(sizes_of(shape, *where))[0][:3]

    def by(impl: Impl) -> Callable[..., Tensor]:
        options = {"num_heads": H, "num_kv_heads": K, "impl": impl}
        inplace = impl is not Impl.REFERENCE  # as in the sampler
        return partial(ops.rope_attention, **options, inplace=inplace)

    rope = Impl.TRITON if device.type == "cuda" else Impl.ATEN
    contenders = {"reference": Impl.REFERENCE}
    if has_impl(rope, "rope", *where):
        contenders["rope, then attention"] = rope
    if device.type == "cuda" and has_impl(Impl.CUDA, "rope_attention", *where):
        contenders["one kernel"] = Impl.CUDA
    subject = Subject("rope_attention", arguments, by(Impl.REFERENCE), 0)
    made = (
        make_contender(name, by(impl), impl is not Impl.REFERENCE, subject, device, False)
        for name, impl in contenders.items()
    )
    needed = work.attention(shape.config, shape.batch, DTYPES[dtype].itemsize)
    return Case(Task("attention", "rope + attention", shape.name, dtype, needed), tuple(made))
