"""The backends of softmax attention: torch, and the flash-attention packages.

A package is imported when a CUDA tensor first needs it. An installed package that does not load
counts as absent, and the reason is kept.
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

from blip3o_fast import reference


class AttentionBackend(Enum):
    """A way to compute softmax attention.

    ``FLASH_ATTN_3``, ``FLASH_ATTN_4`` and ``FLASH_ATTN_2`` are the flash-attention packages.
    ``SDPA`` is ``torch.nn.functional.scaled_dot_product_attention``. It chooses among its own
    kernels as ``torch.nn.attention.sdpa_kernel`` allows; its fused kernels share the keys of a
    group, and its kernel ``MATH`` repeats them.
    """

    FLASH_ATTN_3 = "flash_attn_3"
    FLASH_ATTN_4 = "flash_attn_4"
    FLASH_ATTN_2 = "flash_attn_2"
    SDPA = "sdpa"
    REFERENCE = "reference"


class Package(NamedTuple):
    """A flash-attention package: where its function is, and what it can do."""

    module: str
    distribution: str
    majors: tuple[int, int]
    dropout: bool


PACKAGES = {
    AttentionBackend.FLASH_ATTN_3: Package("flash_attn_interface", "flash_attn_3", (9, 9), False),
    AttentionBackend.FLASH_ATTN_4: Package("flash_attn.cute", "flash-attn-4", (9, 11), False),
    AttentionBackend.FLASH_ATTN_2: Package("flash_attn", "flash-attn", (8, 12), True),
}
"""In the order of the automatic choice. ``majors`` is the range of GPU generations they support."""

MAX_WIDTH = 256


def choose(
    backend: AttentionBackend | None, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> tuple[AttentionBackend, dict[str, list[str]]]:
    """The backend that runs, and the packages that cannot run, by reason.

    None chooses the first package that can run, and ``SDPA`` if there is none.

    Raises:
        ValueError: if ``backend`` cannot run.
    """
    passed: dict[str, list[str]] = {}
    for candidate in PACKAGES if backend is None else (backend,):
        reason = _refusal(candidate, q, k, v, dropout)
        if reason is None:
            return candidate, passed
        passed.setdefault(reason, []).append(candidate.value)
    if backend is None:
        return AttentionBackend.SDPA, passed
    raise ValueError(
        f"backend={backend.name} on {q.dtype} heads of {q.shape[-1]} on {q.device}: "
        f"{next(iter(passed))}; pass backend=None to choose one that can run"
    )


def _refusal(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> str | None:
    """Why ``backend`` cannot run, or None."""
    if backend is AttentionBackend.SDPA:
        return None
    if backend is AttentionBackend.REFERENCE:
        return "the specification has no dropout" if dropout else None
    package, width = PACKAGES[backend], q.shape[-1]
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, got {q.device}"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and knows torch's own kernels"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is switched off, as by torch.nn.attention.sdpa_kernel"
    if dropout and not package.dropout:
        return f"{package.distribution} has no dropout"
    if not (q.numel() and k.numel()):
        return "it needs at least one query and one key"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k or v is not contiguous"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {q.dtype}"
    if width > MAX_WIDTH or width % 8:
        return f"it takes heads of a multiple of 8 up to {MAX_WIDTH}, got {width}"
    low, high = package.majors
    if not low <= (major := _compute_major(q.device)) <= high:
        return f"it knows GPUs of compute capability {low} to {high}, got {major}"
    found = package_function(package)
    return found if isinstance(found, str) else None


@cache
def _compute_major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


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
    """Attention of q ``[B, N, H, d]`` to k, v ``[B, M, K, d]`` by a backend that can run."""
    if backend is AttentionBackend.REFERENCE:
        return reference.attention(q, k, v)
    if backend is AttentionBackend.SDPA:
        # A bool even where torch.jit.trace makes tensors of the sizes.
        grouped = bool(q.shape[2] != k.shape[2])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=grouped)
        return out.transpose(1, 2)
    function = package_function(PACKAGES[backend])
    assert not isinstance(function, str), function
    options = {"dropout_p": dropout} if PACKAGES[backend].dropout else {}
    out = function(q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out
