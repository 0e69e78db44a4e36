"""Fit a solver to a model: the answer of a hundred evaluations in five.

A solver that takes one evaluation a step can only combine what it has seen. After evaluations
``v_0 .. v_n`` the next state is

    x_{n+1} = a_n x_n + sum_{j <= n} c_nj v_j

Euler, Adams-Bashforth and exponential integrators are choices of (a, c). Here they are chosen by
least squares: follow a reference trajectory x*(t) with many evaluations from the same noise; then,
for n = 0, 1, .., evaluate v_n at the state that the fitted solver has reached, and choose the n + 2
numbers so that x_{n+1} is nearest to x*(t_{n+1}) over all elements of all conditions. Later stages
thus correct the errors of earlier ones. Closed form, in fp64, no gradients, no change of weights.

*Times.* t = s u / (1 + (s - 1) u) with u even in [0, 1], rounded to the steps of the reference; s is
searched in ``WARPS``: a poor s costs a factor of 3 to 5. *Shrinkage.* The least squares are damped
towards the Adams-Bashforth coefficients of the same times, by ``DAMPINGS`` of the scale of each
column: few conditions determine few numbers. Both are chosen on half of the conditions, fitted on
the other half; then all of these are fitted, and conditions held out from all of it measure the
error that is stored.

Memory: count + 2 states a condition, and twice that in fp64 for one batch.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.flow import Trajectory
from blip3o_fast.flow.fitted import FittedSolver
from blip3o_fast.flow.solvers import AdamsBashforth
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl
from blip3o_fast.sampling.cache import weights_digest
from blip3o_fast.sampling.inputs import starting_noise
from blip3o_fast.sampling.plan import SamplingPlan

WARPS = (1.0, 1.5, 2.0, 3.0, 4.0)
DAMPINGS = (0.0, 1e-6, 1e-4)
REFERENCE_STEPS = 128
FEWEST_CONDITIONS = 4
BATCH = 8


class Samples(NamedTuple):
    """Conditions with the reference's states at the nodes that the fit needs."""

    eva: Tensor
    nodes: dict[int, Tensor]

    def part(self, first: int, last: int) -> "Samples":
        """Some of them."""
        return Samples(
            self.eva[first:last], {node: x[first:last] for node, x in self.nodes.items()}
        )


def fit_solver(
    model: DiT,
    eva: Tensor,
    *,
    evaluations: int,
    guidance_scale: float = 1.0,
    reference: SamplingPlan | None = None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
    dtype: torch.dtype | None = None,
) -> FittedSolver:
    """Fit a solver of so many evaluations.

    Args:
        model: in any mode; its weights are not changed.
        eva: conditions ``[n, N, E]``; a dozen are enough, 4 the fewest. A quarter is held out.
        evaluations: of the network, at least 1.
        guidance_scale: weight of guidance that samples will be drawn with.
        reference: the sampler to reproduce; its steps are the times to choose from. None is the
            midpoint rule with 128 steps, and for models whose conventions have a sampler of their
            own (``published``) that sampler: 50 steps of Heun on its own labels.
        generator: of the noise; None is torch's default.
        impl, dtype: of the velocities that are fitted, as in ``SamplingPlan``.

    Returns:
        The solver, for ``SamplingPlan(model, solver=fitted)``.

    Raises:
        ValueError: for too few conditions, or options that do not fit the model or each other.
    """
    return fit_solvers(
        model,
        eva,
        evaluations=(evaluations,),
        guidance_scale=guidance_scale,
        reference=reference,
        generator=generator,
        impl=impl,
        dtype=dtype,
    )[evaluations]
