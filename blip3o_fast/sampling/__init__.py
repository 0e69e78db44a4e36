"""Sampling: the network and the flow put together."""

from blip3o_fast.sampling.cache import forget
from blip3o_fast.sampling.fit import fit_solver, fit_solvers
from blip3o_fast.sampling.plan import PlanOptions, SamplingPlan

__all__ = ["SamplingPlan", "PlanOptions", "fit_solver", "fit_solvers", "forget"]
