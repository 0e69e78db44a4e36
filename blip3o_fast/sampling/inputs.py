"""What every sampler checks and draws before its first step."""

import warnings
from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.config import DiTConfig
from blip3o_fast.flow import draw_noise
from blip3o_fast.model import DiT

_WARNED: "WeakSet[DiT]" = WeakSet()


def check_features(model: DiT, eva: Tensor) -> None:
    """Raise ``ValueError`` unless ``eva`` is a finite ``[B, N, E]`` that the model can read."""
    config = model.config
    check_shape("eva_features", eva, "B N E", N=config.num_tokens, E=config.eva_embedding_size)
    if eva.shape[0] == 0:
        raise ValueError("eva_features: expected at least one sample, got an empty batch")
    if not eva.is_floating_point():
        raise ValueError(f"eva_features: expected a floating dtype, got {eva.dtype}")
    device = model.device
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


def warn_of_guidance(model: DiT, guidance_scale: float, stacklevel: int) -> None:
    """Warn, once a model, if guidance is asked of one that never saw an empty condition."""
    if guidance_scale == 1.0 or model.config.condition_dropout > 0 or model in _WARNED:
        return
    _WARNED.add(model)
    warnings.warn(
        f"guidance_scale={guidance_scale:g} on a model trained without condition dropout: its "
        "unconditional velocity was never trained, so guidance has no defined effect",
        stacklevel=stacklevel + 1,
    )


def starting_noise(
    config: DiTConfig,
    eva: Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
    seeds: Sequence[int] | None,
) -> Tensor:
    """Noise ``[B, N, C]`` in fp32 (fp64 for fp64 features): given, or drawn.

    Under the published conventions it is drawn in the dtype of the features, as the published
    ``generate`` does, so that one generator gives one result in both.
    """
    B, N, C = eva.shape[0], config.num_tokens, config.clip_embedding_size
    wide = torch.promote_types(eva.dtype, torch.float32)
    if noise is None:
        drawn = eva.dtype if config.rules.noise_in_feature_dtype and seeds is None else wide
        listed = None if seeds is None else [int(seed) for seed in seeds]
        noise = draw_noise(
            (B, N, C), device=eva.device, dtype=drawn, generator=generator, seeds=listed
        )
        return noise.to(wide)
    if generator is not None or seeds is not None:
        raise ValueError("noise: expected noise, a generator or seeds, got more than one")
    check_shape("noise", noise, "B N C", B=B, N=N, C=C)
    if not noise.is_floating_point():
        raise ValueError(f"noise: expected a floating dtype, got {noise.dtype}")
    if noise.is_meta:
        raise ValueError(f"noise: expected {eva.device}, the device of eva_features, got meta")
    _check_finite("noise", noise)
    return noise.to(device=eva.device, dtype=wide)


def _check_finite(name: str, x: Tensor) -> None:
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(f"{name}: expected finite values, got NaN or Inf in sample {sample}")
