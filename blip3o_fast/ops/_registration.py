"""Registers the operators of an op's record with torch.

A compiler sees one operator with its own fake and gradient. Eager code calls the autograd function
itself, which saves one pass through torch's dispatcher.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as _once_differentiable

from blip3o_fast.ops import _cuda
from blip3o_fast.ops._dispatch import Impl, choose
from blip3o_fast.ops._record import Backward, Fused, Op, as_tuple, find_launcher

# torch's stubs forbid a ``backward`` that names its gradients.
once_differentiable = cast(Callable[[Callable[..., Any]], Any], _once_differentiable)

OPS: dict[str, Op] = {}
"""Every op by name."""


def register(op: Op) -> Op:
    """Define the operators of ``op`` and add it to ``OPS``."""
    if op.triton is not None:
        library = _library("blip3o_fast")
        for operator in op.operators:
            library.define(operator.name + operator.schema)
            launch = _launcher(op.name, operator.launcher)
            for key in ("CPU", "CUDA"):
                library.impl(operator.name, launch, key)
        op.fused[Impl.TRITON] = bind(op, "blip3o_fast", op.name)
    if op.cuda is not None and _cuda.cuda_build().loaded:
        op.fused[Impl.CUDA] = bind(op, "blip3o_fast_cuda")
    OPS[op.name] = op
    return op


def bind(op: Op, namespace: str, kernels: str | None = None) -> Fused:
    """Add fakes and gradients to the operators of ``op`` that a namespace holds.

    ``kernels`` is the module of ``blip3o_kernels`` that they call, None if they are C++.
    """
    library, registered = _library(namespace), getattr(torch.ops, namespace)
    operators: dict[str, Callable[..., Any]] = {}
    for operator in op.operators:
        if hasattr(registered, operator.name):
            qualified = f"{namespace}::{operator.name}"
            torch.library.register_fake(qualified, operator.fake, lib=library)
            operators[operator.launcher] = getattr(registered, operator.name).default
    fused = Fused(operators, kernels)
    if op.backward is None:
        return fused
    recorded = _differentiable(op, op.backward, fused)
    library.impl(op.name, recorded, "Autograd")
    return fused._replace(recorded=recorded)


def resolve_impl(impl: Impl | None, x: Tensor, *, op: str) -> Impl:
    """The implementation that ``op`` runs on ``x``.

    None chooses. For a CUDA tensor that is the CUDA C++ kernel, if it was built, in eager calls
    (``prefer_eager`` changes that), where it was measured to be faster, and where Triton is not
    installed; and Triton otherwise. An op that combines others is the reference, for these others,
    unless its kernel was measured to be faster. On a CPU it is ATen's few passes if the op has
    them and no gradient is recorded, and the reference otherwise. A named implementation is never
    replaced by another.

    Raises:
        ValueError: if the named implementation cannot run here, saying why and what to do.
    """
    return choose(OPS[op], impl, x)


def _differentiable(op: Op, rule: Backward, fused: Fused) -> Callable[..., Any]:
    """The op as a function that autograd records; ``rule`` says how to call its backward."""
    tensors = rule.schema.partition(" -> ")[0].count("Tensor") - rule.results

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                results = fused.find("forward", arguments)(*arguments)
            saved = rule.saved(arguments, results)
            ctx.save_for_backward(*saved[:tensors])
            ctx.others = saved[tensors:]
            ctx.set_materialize_grads(False)
            if rule.results < len(as_tuple(results)):
                ctx.mark_non_differentiable(*results[rule.results :])
            return results

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            needed, gradients = ctx.needs_input_grad, gradients[: rule.results]
            if all(g is None for g in gradients):
                return (None,) * len(needed)
            flag = (any(needed[op.rows :]),) if rule.chooses else ()
            given = (*gradients, *ctx.saved_tensors, *ctx.others, *flag)
            found = as_tuple(fused.find("backward", given)(*given))
            wanted = [g if n else None for g, n in zip(found, needed, strict=False)]
            return *wanted, *(None,) * (len(needed) - len(found))

    return type(op.name, (Function,), {}).apply  # the name that a graph of autograd shows


def _launcher(module: str, function: str) -> Callable[..., Any]:
    """A function of a kernel module as an operator: the module is imported at the first call."""
    return lambda *arguments: find_launcher(module, function)(*arguments)


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")
