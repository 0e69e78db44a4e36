"""Named sizes: a preset, a batch and a number of tokens."""

import math
from dataclasses import dataclass

from blip3o_fast.config import PRESETS, DiTConfig, Size


@dataclass(frozen=True)
class Shape:
    """A preset at a batch and a number of tokens, which are a square grid of patches.

    Attributes:
        preset: tiny, small, base or large.
        batch: samples B, at least 1.
        tokens: N, a square number; 256 is the published 16 x 16.
    """

    preset: Size
    batch: int = 1
    tokens: int = 256

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
        if self.tokens < 1 or math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens: expected a square number, got {self.tokens}")

    @property
    def name(self) -> str:
        """``base-b64``, and ``base-b64-n1024`` where the tokens are not the published 256."""
        tokens = "" if self.tokens == 256 else f"-n{self.tokens}"
        return f"{self.preset}-b{self.batch}{tokens}"

    @property
    def config(self) -> DiTConfig:
        """The model of this shape, in the consistent conventions."""
        side = math.isqrt(self.tokens)
        return DiTConfig.preset(
            self.preset, grid=(1, side, side), num_tokens=self.tokens, zero_init_output=False
        )
