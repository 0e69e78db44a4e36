"""The CUDA build: the library that ``setup.py`` compiled, loaded if this torch can load it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PACKAGE = Path(__file__).parents[1]
_LIBRARY = _PACKAGE / "_C.so"
_RECORD = _PACKAGE / "_build_info.json"
_CHOICES = Path(__file__).with_name("cuda_choices.json")

OPS = ("swiglu", "rope", "sandwich_norm", "sandwich_join", "solver_update", "rope_attention")
"""Public ops that have a CUDA C++ kernel."""

FUSIONS = ("rope_attention",)
"""Kernels that stand for several ops, of which other people's may be faster: only measured."""

WIDEST_NORM = 3072
"""The widest row of ``sandwich_norm`` and ``sandwich_join``: ``BLIP3O_MAX_WIDTH`` of blip3o.h."""

OPERATORS = (
    *("swiglu", "swiglu_backward", "rope", "rope_", "rope_backward"),
    *("sandwich_norm", "sandwich_norm_backward", "sandwich_join", "sandwich_join_backward"),
    "solver_update",
)
"""Registered operators; their schemas and fakes are those of ``blip3o_fast``."""

_INSTALL = "BLIP3O_FAST_CUDA=1 pip install . builds it"


@dataclass(frozen=True)
class CudaBuild:
    """What became of the CUDA build: whether its operators are loaded, and why in one line."""

    loaded: bool
    reason: str


class Choice(NamedTuple):
    """A measurement that prefers the CUDA kernel: rows of ``narrowest`` to ``widest`` elements."""

    op: str
    capability: str
    dtype: str
    narrowest: int
    widest: int
    result: str


def cuda_build() -> CudaBuild:
    """The state of the CUDA build in this process."""
    return _BUILD


def operators() -> Any:
    """The namespace of the loaded operators."""
    return torch.ops.blip3o_fast_cuda


def refusal(op: str, x: Tensor) -> str:
    """Why the CUDA kernel of ``op`` cannot run on ``x`` and what to do, or an empty string."""
    if op not in OPS:
        return "this op has no CUDA C++ kernel; pass impl=Impl.TRITON"
    if not _BUILD.loaded:
        return f"{_BUILD.reason}; or pass impl=Impl.TRITON"
    if not x.is_cuda:
        return "the kernels need a CUDA tensor; pass impl=Impl.REFERENCE on a CPU"
    return limit(op, x)


def limit(op: str, x: Tensor) -> str:
    """Why a loaded CUDA kernel cannot run on ``x``, or an empty string."""
    if x.dtype is torch.float64:
        return "the kernels take float16, bfloat16 and float32; pass impl=Impl.TRITON"
    if op == "rope_attention" and x.dtype is torch.float32:
        return "tensor cores take float16 and bfloat16; pass impl=Impl.TRITON"
    if op.startswith("sandwich") and x.shape[-1] > WIDEST_NORM:
        return f"rows of the norms are at most {WIDEST_NORM} wide; pass impl=Impl.TRITON"
    return ""


def is_chosen(op: str, x: Tensor, *, triton: bool) -> bool:
    """Whether the CUDA kernel runs on ``x`` unasked: measured faster, or Triton is not there."""
    if refusal(op, x):
        return False
    if not triton and op not in FUSIONS:
        return True
    return any(_matches(choice, op, x) for choice in _MEASURED)


def _matches(choice: Choice, op: str, x: Tensor) -> bool:
    capability = ".".join(map(str, torch.cuda.get_device_capability(x.device)))
    given = (op, capability, str(x.dtype).removeprefix("torch."))
    return choice[:3] == given and choice.narrowest <= x.shape[-1] <= choice.widest


def read_choices(path: Path = _CHOICES) -> tuple[Choice, ...]:
    """The measured choices."""
    return tuple(Choice(**entry) for entry in json.loads(path.read_text())["measured"])


def load(library: Path = _LIBRARY, record: Path = _RECORD) -> CudaBuild:
    """Load the operators if they were built."""
    if not record.is_file():
        return CudaBuild(False, f"none: this source tree was not installed; {_INSTALL}")
    facts = json.loads(record.read_text())
    if not facts["built"]:
        return CudaBuild(False, f"none: {facts['reason']}; {_INSTALL}")
    built = f"{' '.join(facts['targets'])}, nvcc {facts['nvcc']}"
    if not library.is_file():
        return CudaBuild(False, f"none: {library} is missing, built for {built}; {_INSTALL}")
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return CudaBuild(False, f"built for {built}, not loaded: {error}; {_INSTALL}")
    _register_fakes()
    if torch.version.cuda is None:
        return CudaBuild(True, f"{built}; loaded, but torch {torch.__version__} is without CUDA")
    return CudaBuild(True, f"{built}; loaded")


def _register_fakes() -> None:
    for name in OPERATORS:
        torch.library.register_fake(f"blip3o_fast_cuda::{name}", _twin(name))
    torch.library.register_fake("blip3o_fast_cuda::rope_attention", fake_rope_attention)


def _twin(name: str) -> Callable[..., Any]:
    """The fake of the operator that shares the schema: on fake tensors that is what it runs."""

    def fake(*args: Any) -> Any:
        return getattr(torch.ops.blip3o_fast, name)(*args)

    return fake


def fake_rope_attention(q: Tensor, *rest: Any) -> Tensor:
    """The fake of the operator that ``blip3o_fast`` does not have."""
    del rest
    return q.new_empty(q.shape)


_MEASURED = read_choices()
_BUILD = load()
