"""The straight path between noise and data.

    t = 0 is noise, t = 1 is data
    x_t = (1 - t) eps + t x_1          v = x_1 - eps          x_1 = x_t + (1 - t) v

This is rectified flow (arXiv:2209.03003). ``blip3o_fast.conventions`` says how the published
implementation departs from it.
"""

import torch
from torch import Tensor


def interpolate(x_1: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 - t) noise + t x_1``; x_1 and noise ``[B, N, C]``, t ``[B]``."""
    return torch.lerp(noise, x_1, t.to(x_1.dtype)[:, None, None])


def draw_noise(
    shape: tuple[int, int, int],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    seeds: list[int] | None = None,
) -> Tensor:
    """Standard normal ``[B, N, C]`` to start from.

    Args:
        shape: (B, N, C).
        device: where the noise is wanted. A generator draws on its own device, so a CPU generator
            gives the same noise everywhere.
        dtype: precision that the noise is drawn in.
        generator: None is torch's default.
        seeds: one per sample; each sample's noise then depends on its seed alone, not on its batch.
    """
    if seeds is None:
        source = generator.device if generator is not None else device
        return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
    if generator is not None:
        raise ValueError("noise: expected a generator or seeds, got both")
    if len(seeds) != shape[0]:
        raise ValueError(f"seeds: expected {shape[0]}, one per sample, got {len(seeds)}")
    noise = torch.empty(shape, dtype=dtype, device="cpu")
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator("cpu").manual_seed(seed))
    return noise.to(device)
