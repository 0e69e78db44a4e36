"""The network: parameters and wiring; the arithmetic is in ``blip3o_fast.ops``."""

from blip3o_fast.model.block import DiTBlock
from blip3o_fast.model.dit import DiT, clean_coefficient, skip_coefficient

__all__ = ["DiT", "DiTBlock", "clean_coefficient", "skip_coefficient"]
