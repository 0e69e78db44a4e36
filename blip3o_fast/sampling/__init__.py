"""Sampling: the network and the flow put together."""

from blip3o_fast.sampling.generate import generate

__all__ = ["generate"]
