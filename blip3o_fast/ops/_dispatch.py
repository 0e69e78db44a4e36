"""Which implementation an op runs: the only place that looks at a device to decide."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.ops import _aten, _cuda


class Impl(Enum):
    """An implementation of a fused op. ``ATEN`` has no backward, and not every op has one."""

    REFERENCE = "reference"
    ATEN = "aten"
    TRITON = "triton"
    CUDA = "cuda"


class Rounding(Enum):
    """Where a fused op rounds between its steps; reductions accumulate in fp32 either way.

    ``FAST`` rounds once, at the end, and is the more accurate. ``FAITHFUL`` rounds wherever the
    reference modules round, so that 16-bit results follow theirs bit by bit, up to the order of
    sums. Gradients are the same in both: computed in fp32 and rounded once.
    """

    FAST = "fast"
    FAITHFUL = "faithful"


@dataclass
class ImplTable:
    """The implementation of each op of one model; None leaves the choice to ``resolve_impl``.

    ``rope_attention`` is for sampling, which rotates by ``rope`` where that is None and no single
    kernel was measured faster.
    """

    sandwich_norm: Impl | None = None
    sandwich_join: Impl | None = None
    rope: Impl | None = None
    swiglu: Impl | None = None
    adapter_norm: Impl | None = None
    adapter_mix: Impl | None = None
    solver_update: Impl | None = None
    flow_loss: Impl | None = None
    rope_attention: Impl | None = None

    def set(self, impl: Impl | None = None, **per_op: Impl | None) -> None:
        """Choose ``impl`` for every op, then the exceptions named in ``per_op``."""
        names = [field.name for field in fields(self)]
        for name in per_op:
            if name not in names:
                raise ValueError(f"unknown op {name!r}; expected one of {', '.join(names)}")
        for name in names:
            setattr(self, name, per_op.get(name, impl))


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all tensors are fp16, bf16, fp32 or fp64 and on one device."""
    given = [(name, x) for name, x in tensors.items() if x is not None]
    first, device = given[0][0], given[0][1].device
    for name, x in given:
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}"
            )
        if x.device != device:
            raise ValueError(f"{name}: expected device {device}, that of {first}, got {x.device}")


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCASTING = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


def outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast does not reach inside a row op: it computes in the dtypes that it is given."""
    kind = x.device.type
    if kind in _AUTOCASTING and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def resolve_impl(
    impl: Impl | None, x: Tensor, *, op: str = "", rounding: Rounding = Rounding.FAST
) -> Impl:
    """The implementation of ``op`` that will run on ``x``.

    None chooses for a CUDA tensor: the CUDA kernel where it was measured faster or Triton is not
    installed, else Triton. On a CPU: ATen's few passes where no gradient is recorded, the op has
    them and ``rounding`` allows. Else the reference. A named implementation is never replaced by
    another. ``op`` is the name of the op, which says what it has.

    Raises:
        ValueError: if the named implementation cannot run here, saying why and what to do.
    """
    if impl is None:
        if not x.is_cuda:
            return Impl.REFERENCE if _aten_refusal(op, x, rounding) else Impl.ATEN
        if _cuda.is_chosen(op, x, triton=_TRITON_INSTALLED):
            return Impl.CUDA
        return Impl.TRITON if _TRITON_INSTALLED else Impl.REFERENCE
    if impl is Impl.ATEN and (refusal := _aten_refusal(op, x, rounding)):
        raise ValueError(f"impl=ATEN on {_described(x)}: {refusal}; pass impl=Impl.REFERENCE")
    if impl is Impl.TRITON:
        _require_triton(x)
    if impl is Impl.CUDA and (refusal := _cuda.refusal(op, x)):
        raise ValueError(f"impl=CUDA on {_described(x)}: {refusal}")
    if not isinstance(impl, Impl):
        raise ValueError(f"impl: expected an Impl or None, got {impl!r}")
    return impl


def operators(impl: Impl) -> Any:
    """The registered operators of a fused implementation; their schemas are the same."""
    return _cuda.operators() if impl is Impl.CUDA else torch.ops.blip3o_fast


def _aten_refusal(op: str, x: Tensor, rounding: Rounding) -> str | None:
    """Why ATen's few passes cannot run ``op`` on ``x``, or None if they can."""
    if op not in _aten.OPS:
        return f"expected one of {', '.join(sorted(_aten.OPS))}, got {op or 'no op'}"
    if x.device.type != "cpu":
        return "expected a CPU tensor"
    if rounding is not Rounding.FAST:
        return "expected rounding=Rounding.FAST"
    if torch.is_grad_enabled():
        return "it has no backward: expected torch.no_grad()"
    if torch.compiler.is_compiling():
        return "expected eager mode, the compiler fuses the reference itself"
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "it writes in place, which torch.jit.trace and torch.func transforms cannot follow"
    return None


def _described(x: Tensor) -> str:
    return f"a {x.dtype} tensor of width {x.shape[-1]} on {x.device}"


def _require_triton(x: Tensor) -> None:
    where = _described(x)
    if not _TRITON_INSTALLED:
        raise ValueError(
            f"impl=TRITON on {where}: Triton is not installed; "
            "install blip3o-fast[triton] or pass impl=Impl.REFERENCE"
        )
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"impl=TRITON on {where}: Triton needs a CUDA tensor, or TRITON_INTERPRET=1 set before "
            "Python starts; pass impl=Impl.REFERENCE on a CPU"
        )
