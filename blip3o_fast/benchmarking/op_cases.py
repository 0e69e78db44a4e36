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
from blip3o_fast.ops import OPS, Impl, Op, Sizes
from blip3o_fast.ops.gemm_swiglu import GEMM_SWIGLU, TILES

MOST_COPIES = 64


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        name: as errors show it.
        arguments: makes its arguments. They are random, since zeros let a device clock higher.
        reference: gives the expected results.
        differentiable: how many of the first arguments receive gradients.
    """

    name: str
    arguments: Callable[[], tuple[Any, ...]]
    reference: Callable[..., Any]
    differentiable: int


def typical(op: Op, sizes: Sizes) -> Subject:
    """An op at its typical specimen."""
    return Subject(
        op.name,
        lambda: op.specimens(sizes)[0],
        op.function(Impl.REFERENCE),
        op.differentiable,
    )


def sizes_of(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Sizes:
    """The sizes of the ops in an evaluation of the network."""
    config = shape.config
    return Sizes(
        batch=shape.batch,
        tokens=shape.tokens,
        width=config.hidden_size,
        inner=config.intermediate_size,
        channels=config.clip_embedding_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_width=config.head_dim,
        adapter=work.padded_widths(config, 1)[1],
        padded=work.padded_widths(config)[1],
        dtype=dtype,
        device=device,
    )


def op_work(op: Op, shape: Shape, dtype: torch.dtype, *, backward: bool = False) -> work.Work:
    """The work that an op cannot avoid at its typical specimen."""
    arguments = op.specimens(sizes_of(shape, dtype, "meta"))[0]
    return work.Work(*op.work(*arguments, backward=backward))


def op_cases(shape: Shape, dtype: str, device: torch.device, *, compiled: bool) -> Iterator[Case]:
    """Every op at one shape, forward and backward, and the gate-up product with ``swiglu``.

    Args:
        shape: widths and rows.
        dtype: of the activations.
        device: of the tensors.
        compiled: also time the reference under ``torch.compile``, which takes long to compile.
    """
    sizes = sizes_of(shape, DTYPES[dtype], device)
    for op, backward, task in op_tasks(shape, dtype):
        contenders = [
            make_contender(name, call, ours, typical(op, sizes), device, backward)
            for name, call, ours in implementations(
                op, shape, dtype, device, compiled=compiled, backward=backward
            )
        ]
        yield Case(task, tuple(contenders))
    yield _gemm_swiglu_case(shape, dtype, device)


def op_tasks(shape: Shape, dtype: str) -> Iterator[tuple[Op, bool, Task]]:
    """Each op that moves rows, whether its gradient is timed, and the task."""
    for op in OPS.values():
        if op.combines:
            continue  # timed beside the ops that it combines: below, and by ``attention_cases``
        for backward in (False, True) if op.backward is not None else (False,):
            needed = op_work(op, shape, DTYPES[dtype], backward=backward)
            name = op.name + (" backward" if backward else "")
            yield op, backward, Task("ops", name, shape.name, dtype, needed)


def _gemm_swiglu_case(shape: Shape, dtype: str, device: torch.device) -> Case:
    """The gate-up product and SwiGLU by two kernels and by one, cut by itself and as told."""
    op, where = GEMM_SWIGLU, (DTYPES[dtype], device)
    subject = typical(op, sizes_of(shape, *where))

    def two(impl: Impl) -> Callable[..., Tensor]:
        return lambda x, weight, _: ops.gemm_swiglu(
            x, weight, impl=Impl.REFERENCE, swiglu_impl=impl
        )

    def one(tile: int | None) -> Callable[..., Tensor]:
        return lambda x, weight, _: op(x, weight, tile, impl=Impl.TRITON)

    made = [("reference", two(Impl.REFERENCE), device.type == "cpu")]
    if device.type == "cuda":
        for impl in (Impl.TRITON, Impl.CUDA):
            if has_impl(impl, "swiglu", *where):
                made.append((f"product, then swiglu by {impl.value}", two(impl), True))
        # Where it cannot run that is no failure of ours, and the record says why it was left out.
        runs = has_impl(Impl.TRITON, op.name, *where)
        made.append(("one kernel", one(None), runs))
        made += [(f"one kernel, tile {i}", one(i), True) for i in range(TILES) if runs]
    contenders = (make_contender(*contender, subject, device, False) for contender in made)
    needed = work.gate_up(shape.config, shape.batch, DTYPES[dtype].itemsize)
    return Case(Task("ops", "gate_up + swiglu", shape.name, dtype, needed), tuple(contenders))


def implementations(
    op: Op,
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    compiled: bool,
    backward: bool,
) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Name, function of the arguments, and whether it is ours."""
    reference = op.function(Impl.REFERENCE)
    yield "reference", reference, device.type == "cpu"
    width = shape.config.hidden_size
    for impl in (Impl.TRITON, Impl.CUDA) if device.type == "cuda" else (Impl.ATEN,):
        # The record says why an implementation is absent.
        if has_impl(impl, op.name, DTYPES[dtype], device, width=width, gradients=backward):
            yield impl.value, op.function(impl), True
    if device.type == "cuda":
        for name, call in peers.op_peers(op.name, shape):
            yield name, partial(_of_tensors, call), False
    if compiled:
        yield "torch.compile", compile_reference(reference, device), False


def _of_tensors(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a peer with the tensors only: it knows the specimen's numbers."""
    return call(*(x for x in arguments if isinstance(x, Tensor)))


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


def compile_reference(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The reference under ``torch.compile``; on a GPU with all tuning, without CUDA graphs."""
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(call, mode=mode, dynamic=False, fullgraph=True)


def make_contender(
    name: str,
    call: Callable[..., Any],
    ours: bool,
    subject: Subject,
    device: torch.device,
    backward: bool,
) -> Contender:
    """An implementation. It must agree with the reference; it is timed on rotating tensors."""

    def prepare() -> Prepared:
        torch.manual_seed(0)
        first = subject.arguments()
        step = sum(x.nbytes for x in first if isinstance(x, Tensor))
        count = max(1, min(MOST_COPIES, -(-rotation_bytes(device) // step)))
        sets = [first, *(subject.arguments() for _ in range(count - 1))]
        make = _backward if backward else _forward
        calls = [make(call, subject, arguments) for arguments in sets]
        expected = make(subject.reference, subject, first)()
        check_agreement(f"{subject.name} by {name}", calls[0](), expected)
        return Prepared(calls, warm=True, rotation=count * step)

    return Contender(name, prepare, ours)


def _forward(
    call: Callable[..., Any], subject: Subject, arguments: tuple[Any, ...]
) -> Callable[[], object]:
    del subject

    def forward() -> object:
        with torch.no_grad():
            return call(*arguments)

    return forward


def _backward(
    call: Callable[..., Any], subject: Subject, arguments: tuple[Any, ...]
) -> Callable[[], object]:
    leaves = [x.requires_grad_() for x in arguments[: subject.differentiable]]
    result = call(*arguments)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    torch.manual_seed(1)  # the same gradients for every contender
    # Not randn_like: it fills memory in its order, which differs between contenders.
    grads = [torch.randn(x.shape, device=x.device, dtype=x.dtype) for x in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)

    return backward
