"""Where softmax attention can be computed: who can take which tensors, and how each is called.

No package is imported before a CUDA tensor asks for it. A package that is installed but broken
counts as absent, with the reason kept.
"""

import importlib
import importlib.util
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip3o_fast import reference


class AttentionBackend(Enum):
    """A way to compute softmax attention.

    ``FLASH_ATTN_3``, ``FLASH_ATTN_4`` and ``FLASH_ATTN_2`` are interfaces of the flash-attention
    packages, ``SDPA_FLASH`` the flash kernel of torch: none repeats the keys and values of a group.
    ``SDPA`` is whatever else ``torch.nn.functional.scaled_dot_product_attention`` finds, which may.
    """

    FLASH_ATTN_3 = "flash_attn_3"
    FLASH_ATTN_4 = "flash_attn_4"
    FLASH_ATTN_2 = "flash_attn_2"
    SDPA_FLASH = "sdpa_flash"
    SDPA = "sdpa"
    REFERENCE = "reference"


class Facts(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    width: int
    dropout: bool
    unit_rows: bool
    empty: bool
    compiling: bool


class Package(NamedTuple):
    """A flash-attention package: where its function is, and which GPUs it knows."""

    module: str
    distribution: str
    majors: tuple[int, int]
    dropout: bool


PACKAGES = {
    AttentionBackend.FLASH_ATTN_3: Package("flash_attn_interface", "flash_attn_3", (9, 9), False),
    AttentionBackend.FLASH_ATTN_4: Package("flash_attn.cute", "flash-attn-4", (9, 11), False),
    AttentionBackend.FLASH_ATTN_2: Package("flash_attn", "flash-attn", (8, 12), True),
}

CHAIN = (*PACKAGES, AttentionBackend.SDPA_FLASH, AttentionBackend.SDPA)
"""The order of the automatic choice."""

TRACING = "torch.compile is tracing, and leaves the choice among torch's own kernels to torch"
MAX_WIDTH = 256
HALVES = (torch.float16, torch.bfloat16)


def refusal(backend: AttentionBackend, facts: Facts) -> str | None:
    """Why a backend cannot run, or None."""
    if backend is AttentionBackend.REFERENCE:
        return "the specification has no dropout" if facts.dropout else None
    if backend is AttentionBackend.SDPA:
        return None
    if facts.empty:
        return "it needs at least one query and one key"
    if not facts.unit_rows:
        return "the last axis of q, k or v is not contiguous"
    if backend is AttentionBackend.SDPA_FLASH:
        return _sdpa_flash_refusal(facts)
    return _package_refusal(PACKAGES[backend], facts)


def _sdpa_flash_refusal(facts: Facts) -> str | None:
    if facts.device.type == "cpu":
        return "torch's flash kernel for CPUs has no dropout" if facts.dropout else None
    if facts.device.type != "cuda":
        return f"it runs on CUDA and CPU tensors, got {facts.device}"
    if facts.compiling:
        return TRACING
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without it"
    return _gpu_refusal(facts, (8, 99))


def _package_refusal(package: Package, facts: Facts) -> str | None:
    if facts.device.type != "cuda":
        return f"it needs CUDA tensors, got {facts.device}"
    if facts.compiling:
        return TRACING
    if facts.dropout and not package.dropout:
        return f"{package.distribution} has no dropout"
    unfit = _gpu_refusal(facts, package.majors)
    found = package_function(package)
    return unfit or (found if isinstance(found, str) else None)


def _gpu_refusal(facts: Facts, majors: tuple[int, int]) -> str | None:
    if facts.dtype not in HALVES:
        return f"it computes in float16 and bfloat16, got {facts.dtype}"
    if facts.width > MAX_WIDTH or facts.width % 8:
        return f"it takes heads of a multiple of 8 up to {MAX_WIDTH}, got {facts.width}"
    major = _compute_major(facts.device.index or 0)
    if not majors[0] <= major <= majors[1]:
        return f"it knows GPUs of compute capability {majors[0]} to {majors[1]}, got {major}"
    return None


@cache
def _compute_major(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


@cache
def package_function(package: Package) -> Callable[..., Any] | str:
    """The package's ``flash_attn_func``, or why there is none."""
    top = package.module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return f"{package.distribution} is not installed"
    try:
        return importlib.import_module(package.module).flash_attn_func
    except (ImportError, AttributeError) as error:
        # flash-attn and flash-attn-4 share a folder: one may be there without the other.
        return f"{package.distribution} is not installed or does not load: {error}"
    except Exception as error:  # a binary built for another torch raises what it likes
        return f"{package.distribution} does not load: {type(error).__name__}: {error}"


def run(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """q ``[B, N, H, d]``, k and v ``[B, M, K, d]`` to ``[B, N, H, d]``, where the backend can."""
    if backend is AttentionBackend.REFERENCE:
        return reference.attention(q, k, v)
    if backend in PACKAGES:
        function = package_function(PACKAGES[backend])
        assert not isinstance(function, str), function
        options = {"dropout_p": dropout} if PACKAGES[backend].dropout else {}
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out
    if backend is AttentionBackend.SDPA_FLASH:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _sdpa(q, k, v, dropout)
    return _sdpa(q, k, v, dropout)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=grouped)
    return out.transpose(1, 2)
