"""The backends of softmax attention: torch's kernels, and the flash-attention packages.

``ORDERS`` is the table of the automatic choice: it says which backend comes first on which GPU, for
inference and where a gradient is recorded, and whether anybody measured that here. A backend that
cannot run is passed for the next one, and ``ops.attention_backend`` says why.

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
    ``CUDNN`` and ``FLASH`` are kernels of torch: that of cuDNN, and torch's flash-attention 2.
    ``SDPA`` is ``torch.nn.functional.scaled_dot_product_attention``. It chooses among its own
    kernels as ``torch.nn.attention.sdpa_kernel`` allows; its fused kernels share the keys of a
    group, and its kernel ``MATH`` repeats them.
    """

    FLASH_ATTN_3 = "flash_attn_3"
    FLASH_ATTN_4 = "flash_attn_4"
    FLASH_ATTN_2 = "flash_attn_2"
    CUDNN = "cudnn"
    FLASH = "flash"
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
"""``majors`` is the range of GPU generations they support."""

MAX_WIDTH = 256
CUDNN_WIDTH = 128
OLDEST_CUDNN = 91501
"""Earlier ones fail on keys that are no multiple of 128 (pytorch/pytorch#169849)."""
CUDNN_KV_HEADS = 8
"""With fewer, decoding on sm_100 is silently wrong (pytorch/pytorch#193893, open)."""


class Order(NamedTuple):
    """A row of ``ORDERS``.

    Attributes:
        backends: the first that can run is chosen, and ``SDPA`` if none can.
        measured: the file under benchmarks/results that the order rests on; "" if there is none.
        why: the reason for the order.
    """

    backends: tuple[AttentionBackend, ...]
    measured: str
    why: str


_HOPPER = (
    AttentionBackend.FLASH_ATTN_3,
    AttentionBackend.CUDNN,
    AttentionBackend.FLASH_ATTN_4,
    AttentionBackend.FLASH_ATTN_2,
    AttentionBackend.FLASH,
)
_BLACKWELL = (
    AttentionBackend.FLASH_ATTN_4,
    AttentionBackend.CUDNN,
    AttentionBackend.FLASH_ATTN_2,
    AttentionBackend.FLASH,
)
ORDERS: dict[tuple[int, bool], Order] = {
    (9, False): Order(_HOPPER, "", "others saw 630 TFLOP/s of 3 and cuDNN, 330 of flash 2"),
    (9, True): Order(_HOPPER, "", "flash 2 expands dk and dv, which costs base 1.6 ms a step"),
    (10, False): Order(_BLACKWELL, "", "4 and cuDNN are written for it, flash 2 is not"),
    (10, True): Order(_BLACKWELL, "", "4 and cuDNN are written for it; flash 2 expands dk and dv"),
}
"""By generation of the GPU, and whether a gradient is recorded.

What others saw is pytorch/pytorch#142132: an H100, heads of 128, 4,608 tokens, not grouped. On
other generations the order is that of ``PACKAGES``, then torch's own, which has flash before cuDNN:
on an A100 others saw cuDNN at 0.82 of its speed (huggingface/transformers#48163). Under
``torch.compile`` torch chooses.

Where H query heads share K keys, flash-attention 2 writes dk and dv as ``[B, M, H, d]``, and reads
them again to add the groups. For base with 128 samples in bf16 these are 201 MB in an attention:
67 us at 3 TB/s, and 1.6 ms in the 24 attentions of a step.
"""
_OTHERS = Order(tuple(PACKAGES), "", "")


def choose(
    backend: AttentionBackend | None, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> tuple[AttentionBackend, dict[str, list[str]]]:
    """The backend that runs, and those before it that cannot run, by reason.

    None chooses the first of ``order_of`` that can run, and ``SDPA`` if there is none.

    Raises:
        ValueError: if ``backend`` cannot run.
    """
    passed: dict[str, list[str]] = {}
    for candidate in order_of(q, k, v).backends if backend is None else (backend,):
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


def order_of(q: Tensor, k: Tensor, v: Tensor) -> Order:
    """The row of ``ORDERS`` for these tensors."""
    if q.device.type != "cuda" or torch.version.hip:
        return _OTHERS
    return ORDERS.get((_compute_major(q.device), _recording(q, k, v)), _OTHERS)


def _recording(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _refusal(
    backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> str | None:
    """Why ``backend`` cannot run, or None."""
    if backend is AttentionBackend.SDPA:
        return None
    if backend is AttentionBackend.REFERENCE:
        return "the specification has no dropout" if dropout else None
    width = q.shape[-1]
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, got {q.device}"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and knows torch's own kernels"
    if not (q.numel() and k.numel()):
        return "it needs at least one query and one key"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k or v is not contiguous"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, got {q.dtype}"
    if width > MAX_WIDTH or width % 8:
        return f"it takes heads of a multiple of 8 up to {MAX_WIDTH}, got {width}"
    if backend is AttentionBackend.CUDNN:
        return _cudnn_refusal(q, k, v, dropout)
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is switched off, as by torch.nn.attention.sdpa_kernel"
    if backend is AttentionBackend.FLASH:
        return _flash_refusal(q, dropout)
    package = PACKAGES[backend]
    if dropout and not package.dropout:
        return f"{package.distribution} has no dropout"
    low, high = package.majors
    if not low <= (major := _compute_major(q.device)) <= high:
        return f"it knows GPUs of compute capability {low} to {high}, got {major}"
    found = package_function(package)
    return found if isinstance(found, str) else None


def _flash_refusal(q: Tensor, dropout: float) -> str | None:
    """Why torch's flash-attention 2 cannot run on half-precision CUDA tensors."""
    if dropout:
        return "dropout is left to SDPA"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    if (major := _compute_major(q.device)) < 8:
        return f"it knows GPUs of compute capability 8 and newer, got {major}"
    return None


def _cudnn_refusal(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> str | None:
    """Why cuDNN's kernel cannot run on half-precision CUDA tensors, or is not to be trusted."""
    major, version = _compute_major(q.device), torch.backends.cudnn.version() or 0
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "cuDNN attention is switched off, as by torch.nn.attention.sdpa_kernel"
    if dropout:
        return "dropout is left to SDPA"
    if torch.version.hip:
        return "this torch is for ROCm"
    if major < 8:
        return f"it knows GPUs of compute capability 8 and newer, got {major}"
    if q.shape[-1] > CUDNN_WIDTH:
        return f"it takes heads of up to {CUDNN_WIDTH}, got {q.shape[-1]}"
    if k.shape[1] == 1:
        return "it needs at least two keys"
    if version < OLDEST_CUDNN:
        return f"it needs cuDNN {OLDEST_CUDNN} or newer, got {version}"
    if major == 10 and k.shape[2] < CUDNN_KV_HEADS:
        return f"on sm_100 it may be wrong with fewer than {CUDNN_KV_HEADS} heads of keys"
    if _recording(q, k, v):
        if torch.are_deterministic_algorithms_enabled():
            return "its gradients differ from run to run"
        if k.shape[1] % 128 == 64 or q.shape[1] == 1:
            return "its gradients may be NaN for one query, or 64 keys beyond a multiple of 128"
    return None


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
    if backend in (AttentionBackend.CUDNN, AttentionBackend.FLASH):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is AttentionBackend.FLASH:
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        else:
            recording = _recording(q, k, v)
            out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, recording)[0]
        return out.transpose(1, 2)
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
