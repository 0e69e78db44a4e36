"""The fused ops, forward and backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking import peers, work
from blip3o_fast.benchmarking.cases import Case, Contender, Task, check_agreement
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Prepared, rotation_bytes
from blip3o_fast.ops import Impl

Sizes = list[tuple[int, ...]]
MOST_COPIES = 64


@dataclass(frozen=True)
class OpSpec:
    """An op as a function of tensors; the first ``differentiable`` of them receive gradients.

    ``wide`` are the positions of tensors that are fp32 whatever the dtype of the rest.
    """

    name: str
    call: Callable[..., Any]
    sizes: Callable[[Shape], Sizes]
    differentiable: int
    wide: frozenset[int] = frozenset()

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Random inputs: zeros would let a device clock higher."""
        tensors = [
            (0.5 * torch.randn(size, device=device)).to(torch.float32 if i in self.wide else dtype)
            for i, size in enumerate(self.sizes(shape))
        ]
        if self.name in ROTARY:  # a true rotation: both members of a pair turn by one angle
            for table in tensors[1:]:
                low, high = table.chunk(2, dim=-1)
                high.copy_(low)
        return tensors


ROTARY = ("rope", "rope_attention")


def _norm(shape: Shape) -> Sizes:
    D = shape.config.hidden_size
    return [(D,), (D,), (shape.batch, D), (shape.batch, D)]


def _stream(shape: Shape) -> tuple[int, ...]:
    return (shape.batch, shape.tokens, shape.config.hidden_size)


def _state(shape: Shape) -> tuple[int, ...]:
    return (shape.batch, shape.tokens, shape.config.clip_embedding_size)


def _rope(qkv: Tensor, cos: Tensor, sin: Tensor, *, shape: Shape, impl: Impl | None) -> Tensor:
    H, K = shape.config.num_attention_heads, shape.config.num_key_value_heads
    return ops.rope(qkv, cos, sin, num_heads=H, num_kv_heads=K, impl=impl)


def rope_sizes(shape: Shape) -> Sizes:
    """A packed projection and its tables."""
    config = shape.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    table = (shape.tokens, config.head_dim)
    return [(shape.batch, shape.tokens, heads * config.head_dim), table, table]


def _join(x: Tensor, y: Tensor, scale: Tensor, *norms: Tensor, impl: Impl | None) -> Any:
    post, pre = ops.Modulation(*norms[:4]), ops.Modulation(*norms[4:])
    return ops.sandwich_join(x, y, scale, post, pre, eps=1e-6, impl=impl)


def _adapter_sizes(shape: Shape) -> Sizes:
    width = work.adapter_widths(shape.config, multiple=1)[1]
    padded = work.adapter_widths(shape.config)[1]
    return [(shape.batch, shape.tokens, padded), (width,), (width,)]


def _loss(v: Tensor, x_t: Tensor, x_1: Tensor, noise: Tensor, t: Tensor, *, impl: Any) -> Tensor:
    return ops.flow_loss(
        *(v, x_t, x_1, noise, t.sigmoid()),
        weights=ops.LossWeights(),
        conventions="consistent",
        masks=False,
        impl=impl,
    ).total


SPECS = (
    OpSpec(
        "sandwich_norm",
        partial(ops.sandwich_norm, eps=1e-6),
        lambda s: [_stream(s), *_norm(s)],
        5,
    ),
    OpSpec(
        "sandwich_join",
        _join,
        lambda s: [_stream(s), _stream(s), (s.config.hidden_size,), *_norm(s), *_norm(s)],
        11,
    ),
    OpSpec("rope", _rope, rope_sizes, 1, frozenset((1, 2))),
    OpSpec(
        "swiglu",
        ops.swiglu,
        lambda s: [(s.batch, s.tokens, 2 * s.config.intermediate_size)],
        1,
    ),
    OpSpec("adapter_norm", ops.adapter_norm, _adapter_sizes, 3),
    OpSpec("adapter_mix", ops.adapter_mix, lambda s: [_stream(s)] * 3, 3),
    OpSpec(
        "solver_update",
        ops.solver_update,
        lambda s: [_state(s), _state(s), (1, *_state(s)), (3,)],
        0,
        frozenset((0, 2, 3)),
    ),
    OpSpec(
        "flow_loss",
        _loss,
        lambda s: [*[_state(s)] * 4, (s.batch,)],
        1,
        frozenset((1, 2, 3, 4)),
    ),
)
"""Eight ops; attention is apart, since its implementations are other people's."""


def op_cases(shape: Shape, dtype: str, device: torch.device, *, compiled: bool) -> Iterator[Case]:
    """Every op at one shape, forward and backward.

    Args:
        shape: widths and rows.
        dtype: of the activations.
        device: where.
        compiled: also time the reference under ``torch.compile``, which takes its time to compile.
    """
    size = DTYPES[dtype].itemsize
    for spec in SPECS:
        for backward in (False, True) if spec.differentiable else (False,):
            task = Task(
                "ops",
                spec.name + (" backward" if backward else ""),
                shape.name,
                dtype,
                work.row_op(spec.name, shape, size, backward=backward),
            )
            contenders = [
                make_contender(name, call, ours, spec, shape, dtype, device, backward)
                for name, call, ours in implementations(
                    spec, shape, dtype, device, compiled=compiled, backward=backward
                )
            ]
            yield Case(task, tuple(contenders))


def implementations(
    spec: OpSpec,
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    compiled: bool,
    backward: bool,
) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Name, function of the tensors, and whether it is ours."""
    reference = reference_call(spec, shape)
    yield "reference", reference, device.type == "cpu"
    width = shape.config.hidden_size
    for impl in (Impl.TRITON, Impl.CUDA) if device.type == "cuda" else (Impl.ATEN,):
        # The record says why not in its lists of what is absent and left out.
        if has_impl(impl, spec.name, DTYPES[dtype], device, width=width, gradients=backward):
            yield impl.value, op_call(spec, shape, impl), True
    if device.type == "cuda":
        yield from peers.op_peers(spec.name, shape)
    if compiled:
        yield "torch.compile", compile_reference(reference, device), False


def has_impl(
    impl: Impl,
    op: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    width: int = 64,
    gradients: bool = False,
) -> bool:
    """Whether an implementation of an op can run here on rows of ``width``."""
    sample = torch.empty(0, 1, width, dtype=dtype, device=device)
    try:
        with torch.set_grad_enabled(gradients):
            ops.resolve_impl(impl, sample, op=op)
    except ValueError:
        return False
    return True


def op_call(spec: OpSpec, shape: Shape, impl: Impl) -> Callable[..., Any]:
    """An op by one implementation, as a function of its tensors."""
    extra = {"shape": shape} if spec.name in ROTARY else {}
    return partial(spec.call, impl=impl, **extra)


def reference_call(spec: OpSpec, shape: Shape) -> Callable[..., Any]:
    """An op of plain PyTorch."""
    return op_call(spec, shape, Impl.REFERENCE)


def compile_reference(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The reference under ``torch.compile``, tuned as far as it goes without a graph of its own."""
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(call, mode=mode, dynamic=False, fullgraph=True)


def make_contender(
    name: str,
    call: Callable[..., Any],
    ours: bool,
    spec: OpSpec,
    shape: Shape,
    dtype: str,
    device: torch.device,
    backward: bool,
) -> Contender:
    """An implementation, to be timed on tensors that rotate once it agrees with the reference."""

    def prepare() -> Prepared:
        torch.manual_seed(0)
        first = spec.tensors(shape, DTYPES[dtype], device)
        step = sum(x.nbytes for x in first)
        count = max(1, min(MOST_COPIES, -(-rotation_bytes(device) // step)))
        sets = [first, *(spec.tensors(shape, DTYPES[dtype], device) for _ in range(count - 1))]
        make = _backward if backward else _forward
        calls = [make(call, spec, tensors) for tensors in sets]
        expected = make(reference_call(spec, shape), spec, first)()
        check_agreement(f"{spec.name} by {name}", calls[0](), expected)
        return Prepared(calls, warm=True, rotation=count * step)

    return Contender(name, prepare, ours)


def _forward(call: Callable[..., Any], spec: OpSpec, tensors: list[Tensor]) -> Callable[[], object]:
    del spec

    def forward() -> object:
        with torch.no_grad():
            return call(*tensors)

    return forward


def _backward(
    call: Callable[..., Any], spec: OpSpec, tensors: list[Tensor]
) -> Callable[[], object]:
    leaves = [x.requires_grad_() for x in tensors[: spec.differentiable]]
    result = call(*leaves, *tensors[spec.differentiable :])
    outputs = [result] if isinstance(result, Tensor) else list(result)
    torch.manual_seed(1)  # every contender is given the same gradients
    # Not randn_like: it fills memory in its order, which differs between contenders.
    grads = [torch.randn(x.shape, device=x.device, dtype=x.dtype) for x in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)

    return backward
