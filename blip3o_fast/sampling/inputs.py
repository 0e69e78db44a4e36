"""The checks before the first step and after the last, and the noise to start from."""

import warnings
from collections.abc import Sequence
from functools import cache
from weakref import WeakSet

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.errors import NonFiniteSamples
from blip3o_fast.flow import draw_noise
from blip3o_fast.model import DiT

_WARNED: "WeakSet[DiT]" = WeakSet()
_LISTED = 8  # samples named in an error


def warn_of_guidance(model: DiT, guidance_scale: float, stacklevel: int) -> None:
    """Warn, once for each model, if guidance is used without condition dropout in training."""
    if guidance_scale == 1.0 or model.config.condition_dropout > 0 or model in _WARNED:
        return
    _WARNED.add(model)
    warnings.warn(
        f"guidance_scale={guidance_scale:g} on a model trained without condition dropout: its "
        "unconditional velocity was never trained, so guidance has no defined effect",
        stacklevel=stacklevel + 1,
    )


@cache
def warn_of_bf16() -> None:
    """Warn, once for each process, that a CPU computes in fp32 what was asked for in bf16."""
    warnings.warn(
        "this CPU does not multiply bf16 (avx512_bf16); sampling computes in fp32, which is faster",
        stacklevel=4,
    )


def starting_noise(
    model: DiT,
    eva: Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
) -> Tensor:
    """Check EVA tokens ``[B, N, E]``, and return the noise ``[B, N, C]`` to start from.

    The noise is given, or drawn in fp32 (fp64 for fp64 features). The published conventions draw it
    in the dtype of the features. The published ``generate`` does so too, so a generator gives the
    same noise in both.

    Raises:
        RuntimeError: inside the capture of a CUDA graph.
        ValueError: unless features and noise are finite and fit the model.
    """
    _refuse_outer_capture(eva.device)
    config = model.config
    N, C, E = config.num_tokens, config.clip_embedding_size, config.eva_embedding_size
    check_shape("eva_features", eva, "B N E", N=N, E=E)
    if eva.shape[0] == 0:
        raise ValueError("eva_features: expected at least one sample, got an empty batch")
    if noise is not None:
        check_shape("noise", noise, "B N C", B=eva.shape[0], N=N, C=C)
    _check_features(eva, model.device)
    wide = torch.promote_types(eva.dtype, torch.float32)
    if noise is None:
        drawn = eva.dtype if config.rules.noise_in_feature_dtype and seeds is None else wide
        listed = None if seeds is None else [int(seed) for seed in seeds]
        shape = (eva.shape[0], N, C)
        noise = draw_noise(shape, device=eva.device, dtype=drawn, generator=generator, seeds=listed)
        return noise.to(wide)
    if generator is not None or seeds is not None:
        raise ValueError("noise: expected noise, a generator or seeds, got more than one")
    if not noise.is_floating_point():
        raise ValueError(f"noise: expected a floating dtype, got {noise.dtype}")
    if noise.is_meta:
        raise ValueError(f"noise: expected {eva.device}, the device of eva_features, got meta")
    _check_finite("noise", noise)
    return noise.to(device=eva.device, dtype=wide)


def require_finite_samples(x: Tensor, dtype: torch.dtype) -> None:
    """Raise ``NonFiniteSamples`` if a sample of ``x [B, ...]`` holds NaN or Inf.

    Args:
        x: what the sampler made.
        dtype: that it computed in, for the remedy.
    """
    finite = x.isfinite().flatten(1).all(1)
    if finite.all():
        return
    bad = tuple((~finite).nonzero().flatten().tolist())
    listed = ", ".join(map(str, bad[:_LISTED])) + (" ..." if len(bad) > _LISTED else "")
    remedy = "look at their eva_features and at the weights of the model"
    if dtype == torch.float16 or x.dtype == torch.float16:
        remedy = "use dtype=torch.bfloat16 or torch.float32, whose range is wider"
    raise NonFiniteSamples(
        f"generate: expected finite samples, got NaN or Inf in {listed} of {len(x)}; {remedy}", bad
    )


def _refuse_outer_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "generate: cannot run while a CUDA graph is being captured on this stream: it checks "
            "its inputs on the host and replays graphs of its own; call it outside the capture"
        )


def _check_features(eva: Tensor, device: torch.device) -> None:
    if not eva.is_floating_point():
        raise ValueError(f"eva_features: expected a floating dtype, got {eva.dtype}")
    if device.type == "meta":
        raise ValueError("model: expected loaded weights, got parameters on the meta device")
    if eva.device != device:
        raise ValueError(f"eva_features: expected {device}, the model's device, got {eva.device}")
    if eva.requires_grad:
        raise ValueError(
            "eva_features: expected a tensor that requires no gradient, since generate is not "
            "differentiable; pass eva_features.detach()"
        )
    _check_finite("eva_features", eva)


def _check_finite(name: str, x: Tensor) -> None:
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got NaN or Inf in sample {sample}")
