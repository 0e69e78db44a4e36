"""The CUDA build: the library that ``setup.py`` compiles. It is loaded if this torch can."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_fast.installation import install

_PACKAGE = Path(__file__).parents[1]
_LIBRARY = _PACKAGE / "_C.so"
_RECORD = _PACKAGE / "_build_info.json"
_CHOICES = Path(__file__).with_name("cuda_choices.json")

WIDEST_NORM = 3072
"""The widest row of ``sandwich_norm`` and ``sandwich_join``: ``BLIP3O_MAX_WIDTH`` of blip3o.h."""

_INSTALL = f"BLIP3O_FAST_CUDA=1 {install()} builds it"


@dataclass(frozen=True)
class CudaBuild:
    """Whether the operators of the CUDA build are loaded, and the reason in one line."""

    loaded: bool
    reason: str


class Choice(NamedTuple):
    """Rows of ``narrowest`` to ``widest`` elements, on which a kernel was the fastest.

    That is the CUDA C++ kernel of ``op``. If ``op`` combines several, it is their one kernel.
    """

    op: str
    capability: str
    dtype: str
    narrowest: int
    widest: int
    result: str


def cuda_build() -> CudaBuild:
    """The state of the CUDA build in this process."""
    return _BUILD


def dtype_refusal(x: Tensor) -> str | None:
    """Why the dtype of ``x`` has no CUDA kernel, or None."""
    if x.dtype is torch.float64:
        return "the kernels take float16, bfloat16 and float32"
    return None


def norm_refusal(x: Tensor) -> str | None:
    """Why the CUDA kernels of the norms do not take rows like those of ``x``, or None."""
    if x.shape[-1] > WIDEST_NORM:
        return f"rows of the norms are at most {WIDEST_NORM} wide"
    return dtype_refusal(x)


def is_measured(op: str, x: Tensor) -> bool:
    """Whether a kernel was measured to be the fastest on rows like those of ``x``."""
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
    if torch.version.cuda is None:
        return CudaBuild(True, f"{built}; loaded, but torch {torch.__version__} is without CUDA")
    return CudaBuild(True, f"{built}; loaded")


_MEASURED = read_choices()
_BUILD = load()
