"""Which implementation an op runs: the only place that looks at a device to decide."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from blip3o_fast.installation import install
from blip3o_fast.ops import _cuda

if TYPE_CHECKING:
    from blip3o_fast.ops._record import Op


class Impl(Enum):
    """An implementation of a fused op. ``ATEN`` has no backward pass, and not every op has it."""

    REFERENCE = "reference"
    ATEN = "aten"
    TRITON = "triton"
    CUDA = "cuda"


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that an op takes."""

EAGER_VARIABLE = "BLIP3O_FAST_EAGER"

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCASTING = tuple(
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
)


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def prefer_eager(impl: Impl) -> None:
    """Choose the kernels of eager calls on a GPU where both CUDA C++ and Triton can run.

    The default is ``Impl.CUDA``, whose call costs the host less, or what the environment variable
    ``BLIP3O_FAST_EAGER`` (``cuda`` or ``triton``) said when Python started. CUDA graphs and
    compiled regions do not pay that cost: they run what was measured to be faster.

    Raises:
        ValueError: for any other implementation.
    """
    global _eager
    if impl not in (Impl.CUDA, Impl.TRITON):
        raise ValueError(f"expected Impl.CUDA or Impl.TRITON, got {impl!r}")
    _eager = impl


def _eager_by_environment() -> Impl:
    word = os.environ.get(EAGER_VARIABLE, Impl.CUDA.value)
    if word not in (Impl.CUDA.value, Impl.TRITON.value):
        raise ValueError(f"{EAGER_VARIABLE}: expected cuda or triton, got {word!r}")
    return Impl(word)


_eager = _eager_by_environment()


def check_tensors(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all are fp16, bf16, fp32 or fp64 and on one device."""
    first, device = "", None
    for name, x in tensors.items():
        if x is None:
            continue
        first, device = (first, device) if first else (name, x.device)
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}"
            )
        if x.device != device:
            raise ValueError(f"{name}: expected device {device}, that of {first}, got {x.device}")


def outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off: a fused op computes in the dtypes of its arguments."""
    kind = x.device.type
    if kind in _AUTOCASTING and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def choose(op: "Op", impl: Impl | None, x: Tensor) -> Impl:
    """The implementation that runs on ``x``, as ``ops.resolve_impl`` says."""
    if impl is None:
        if not x.is_cuda:
            return Impl.REFERENCE if refusal(op, Impl.ATEN, x) else Impl.ATEN
        if _transformed():
            return Impl.REFERENCE
        if op.combines:
            kernel = Impl.TRITON if op.cuda is None else Impl.CUDA
            runs = _cuda.is_measured(op.name, x) and refusal(op, kernel, x) is None
            return kernel if runs else Impl.REFERENCE
        if refusal(op, Impl.CUDA, x) is None and (
            not (_TRITON_INSTALLED and (_eager is Impl.TRITON or _recorded_once()))
            or _cuda.is_measured(op.name, x)
        ):
            return Impl.CUDA
        return Impl.TRITON if _TRITON_INSTALLED else Impl.REFERENCE
    if not isinstance(impl, Impl):
        raise ValueError(f"impl: expected an Impl or None, got {impl!r}")
    if reason := refusal(op, impl, x):
        where = f"a {x.dtype} tensor of width {x.shape[-1]} on {x.device}"
        raise ValueError(f"{op.name}: impl={impl.name} on {where}: {reason}")
    return impl


def refusal(op: "Op", impl: Impl, x: Tensor) -> str | None:
    """Why an implementation of ``op`` cannot run on ``x`` and what to do, or None if it can."""
    if impl is Impl.REFERENCE:
        return None
    if _transformed():
        return (
            "only the reference has rules for torch.func and forward-mode derivatives; pass "
            "impl=None or impl=Impl.REFERENCE"
        )
    if impl is Impl.ATEN:
        reason = _aten_refusal(op, x)
        return reason and f"{reason}; pass impl=Impl.REFERENCE"
    if impl is Impl.TRITON:
        return _triton_refusal(op, x)
    return _cuda_refusal(op, x)


def _recorded_once() -> bool:
    """Whether the host makes this call once for many runs: in a CUDA graph or a compiled region."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _transformed() -> bool:
    """Whether torch.func or a forward-mode derivative is active. Both only know ATen's ops."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _aten_refusal(op: "Op", x: Tensor) -> str | None:
    if op.aten is None:
        return "this op has no ATen implementation"
    if x.device.type != "cpu":
        return "expected a CPU tensor"
    if torch.is_grad_enabled():
        return "it has no backward: expected torch.no_grad()"
    if torch.compiler.is_compiling():
        return "expected eager mode, the compiler fuses the reference itself"
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "it writes in place, which torch.jit.trace cannot follow"
    return None


def _triton_refusal(op: "Op", x: Tensor) -> str | None:
    if op.triton is None:
        return "this op has no Triton kernel; pass impl=None"
    if not _TRITON_INSTALLED:
        return f"Triton is not installed: {install('triton')}; or pass impl=Impl.REFERENCE"
    if not x.is_cuda and not interpreting():
        return (
            "Triton needs a CUDA tensor, or TRITON_INTERPRET=1 set before Python starts; pass "
            "impl=Impl.REFERENCE on a CPU"
        )
    reason = op.triton(x)
    return reason and f"{reason}; pass impl=Impl.REFERENCE"


def _cuda_refusal(op: "Op", x: Tensor) -> str | None:
    if op.cuda is None:
        return "this op has no CUDA C++ kernel; pass impl=Impl.TRITON"
    if not (build := _cuda.cuda_build()).loaded:
        return f"{build.reason}; or pass impl=Impl.TRITON"
    if not x.is_cuda:
        return "the kernels need a CUDA tensor; pass impl=Impl.REFERENCE on a CPU"
    reason = op.cuda(x)
    return reason and f"{reason}; pass impl=Impl.TRITON"
