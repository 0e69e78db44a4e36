"""Other libraries at the same tasks: which are present, and why the others are not.

Their kernels do parts of our ops. So a peer is the code that one would write with that library: its
kernels where they fit, and torch for the rest. It is timed only if it agrees with the reference.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking.shapes import Shape

PEERS = {
    "liger-kernel": "liger_kernel",
    "quack-kernels": "quack",
    "apex": "apex.normalization",
    "flash-attn": "flash_attn",
    "flash-attn-4": "flash_attn.cute",
    "flash_attn_3": "flash_attn_interface",
    "triton": "triton",
}
"""By distribution: the module that is imported to see whether it works."""


def find_peers(device: torch.device) -> dict[str, str]:
    """For every peer its version, or ``absent: `` and the reason."""
    found = {name: _state(name, module) for name, module in PEERS.items()}
    if device.type == "cpu":
        for name, state in found.items():
            if name != "triton" and not state.startswith("absent"):
                found[name] = f"absent: {state} is installed, but its kernels need a GPU"
    build = ops.cuda_build()
    found["CUDA C++ kernels"] = "loaded" if build.loaded else f"absent: {build.reason}"
    return found


def _state(name: str, module: str) -> str:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "absent: not installed"
    try:
        importlib.import_module(module)
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed, version unknown"
    except Exception as error:  # a binary built for another torch raises what it likes
        return f"absent: does not load: {type(error).__name__}: {error}"


def backend_refusal(backend: ops.AttentionBackend, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a backend of attention cannot run on these tensors, or None."""
    try:
        ops.attention_backend(q, k, v, backend=backend)
        return None
    except ValueError as error:
        return str(error)


def op_peers(name: str, shape: Shape) -> Iterator[tuple[str, Callable[..., Any]]]:
    """An op by each installed library: its name, and a function from our tensors to our results."""
    norms = {"liger": ("liger_kernel", _liger), "quack": ("quack", _quack), "apex": ("apex", _apex)}
    if name in ("sandwich_norm", "sandwich_join"):
        for library, (module, norm) in norms.items():
            if importlib.util.find_spec(module) is not None:
                yield library, norm if name == "sandwich_norm" else _sandwich_join(norm)
    own = {"swiglu": _liger_swiglu, "rope": _liger_rope(shape)}.get(name)
    if own is not None and importlib.util.find_spec("liger_kernel") is not None:
        yield "liger", own


DoubleNorm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(x, w1, w2, shift, scale)``: the contract of ``ops.sandwich_norm``."""


def _sandwich_join(norm: DoubleNorm) -> Callable[..., Any]:
    def join(x: Tensor, y: Tensor, layer_scale: Tensor, *norms: Tensor) -> tuple[Tensor, Tensor]:
        w3, w4, post_shift, post_scale, w1, w2, shift, scale = norms
        x = x + norm(layer_scale * y, w3, w4, post_shift, post_scale)
        return x, norm(x, w1, w2, shift, scale)

    return join


def _liger(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm, then modulated RMSNorm: two launches."""
    plain = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    modulated = importlib.import_module("liger_kernel.ops.modulated_rms_norm")
    h = plain.apply(x, w1, 1e-6, 0.0, "llama", False)
    function = modulated.LigerModulatedRMSNormFunction
    return function.apply(h, w2, scale, shift, 1e-6, 0.0, "llama", False)


def _quack(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Two RMSNorms, then torch."""
    norm = importlib.import_module("quack").rmsnorm
    return _modulated(norm(norm(x, w1, eps=1e-6), w2, eps=1e-6), shift, scale)


def _apex(x: Tensor, w1: Tensor, w2: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Two RMSNorms, then torch."""
    norm = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    return _modulated(norm(norm(x, w1, w1.shape, 1e-6), w2, w2.shape, 1e-6), shift, scale)


def _modulated(u: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, None], u, 1 + scale[:, None])


def _liger_swiglu(gate_up: Tensor) -> Tensor:
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return function.apply(*gate_up.chunk(2, dim=-1))


def _liger_rope(shape: Shape) -> Callable[..., Any]:
    config = shape.config
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def rope(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # It reads half of a table. The halves are equal here.
        function = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
        q, k, v = qkv.unflatten(-1, (H + 2 * K, d)).split((H, K, K), dim=2)
        q, k = function.apply(
            q.transpose(1, 2), k.transpose(1, 2), cos[None].to(q.dtype), sin[None].to(q.dtype)
        )
        return q.transpose(1, 2), k.transpose(1, 2), v

    return rope
