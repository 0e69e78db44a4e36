"""The network: its computation (``network``), and the modules that hold its parameters."""

from blip3o_fast.model.block import DiTBlock
from blip3o_fast.model.dit import DiT, plain_velocity

__all__ = ["DiT", "DiTBlock", "plain_velocity"]
