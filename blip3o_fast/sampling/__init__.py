"""Sampling: the network and the flow put together."""

from blip3o_fast.sampling.engine import forget
from blip3o_fast.sampling.generate import generate
from blip3o_fast.sampling.plain import plain_velocity
from blip3o_fast.sampling.plan import SamplingPlan

__all__ = ["generate", "SamplingPlan", "forget", "plain_velocity"]
