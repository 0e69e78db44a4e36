"""Rotary positions on a (depth, height, width) grid (arXiv:2104.09864, one angle per axis).

``ops.rope`` turns the pair (i, i + d/2) of a head by ``cos[i], sin[i]`` and ``cos[j], sin[j]``.

*rotation*: both members of a pair have the same angle, so the map is a rotation. It preserves
norms, and a logit depends only on the offset between two tokens. The d/2 angles are divided among
the axes longer than 1. Each axis has its own geometric sequence of frequencies.

*shear*: the published layout. The head is divided into [height d/4 | width d/4 | depth d/2], and
the two halves of each part have the same angles. So a pair mixes a height or width angle with a
depth angle, which is 0 on a grid of depth 1. The map is then a shear and depends on absolute
positions.

A CLS token has angle 0. Without ``use_3d_rope`` positions are 1-D, one per token.
"""

import torch
from torch import Tensor, nn

from blip3o_fast.config import DiTConfig


class RotaryTables(nn.Module):
    """``cos`` and ``sin`` ``[N, d]``, which stay fp32 when the model is cast.

    The largest angle on the default grid is 15 radians. There bf16 is off by up to 0.03 rad.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        # They are computed on the CPU; parameters are made on the default device.
        device = torch.empty(0).device
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "RotaryTables":  # noqa: ANN001
        super()._apply(fn, recurse)
        if not self.cos.is_meta:
            cos, sin = rotary_tables(self.config)
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self


def rotary_tables(config: DiTConfig) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each ``[N, d]`` fp32, on the CPU, so that every device has the same bits."""
    with torch.device("cpu"):
        if not config.use_3d_rope:
            angles = _sequence_angles(config)
        else:
            angles = _with_cls(_LAYOUTS[config.rules.rotary](config), config)
    return angles.cos(), angles.sin()


def _grid_angles(config: DiTConfig) -> Tensor:
    """Angles ``[depth * height * width, d]``, both halves equal."""
    half = config.head_dim // 2
    grid = config.patches
    axes = [axis for axis, length in enumerate(grid) if length > 1] or [2]
    counts = [half // len(axes) + (i < half % len(axes)) for i in range(len(axes))]
    positions = _positions(grid)
    angles = torch.cat(
        [
            positions[axis][:, None] * _frequencies(count, config.rope_theta)
            for axis, count in zip(axes, counts, strict=True)
        ],
        dim=1,
    )
    return angles.repeat(1, 2)


def _sheared_angles(config: DiTConfig) -> Tensor:
    """Angles ``[depth * height * width, d]`` in the published layout."""
    d = config.head_dim
    depth, height, width = _positions(config.patches)
    blocks = ((height, d // 4), (width, d // 4), (depth, d // 2))
    return torch.cat(
        [
            (position[:, None] * _frequencies(size // 2, config.rope_theta)).repeat(1, 2)
            for position, size in blocks
        ],
        dim=1,
    )


_LAYOUTS = {"rotation": _grid_angles, "shear": _sheared_angles}


def _sequence_angles(config: DiTConfig) -> Tensor:
    """Angles ``[N, d]`` of 1-D positions."""
    position = torch.arange(config.num_tokens, dtype=torch.float32)
    frequencies = _frequencies(config.head_dim // 2, config.rope_theta)
    return (position[:, None] * frequencies).repeat(1, 2)


def _with_cls(angles: Tensor, config: DiTConfig) -> Tensor:
    return torch.cat((angles.new_zeros(1, angles.shape[1]), angles)) if config.has_cls else angles


def _positions(grid: tuple[int, int, int]) -> list[Tensor]:
    """Depth, height and width index of every patch, row-major."""
    axes = [torch.arange(length, dtype=torch.float32) for length in grid]
    return [index.flatten() for index in torch.meshgrid(*axes, indexing="ij")]


def _frequencies(count: int, theta: float) -> Tensor:
    """``theta^(-i / count)`` for i < count."""
    return theta ** (-torch.arange(count, dtype=torch.float32) / count)
