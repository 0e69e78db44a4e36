"""Fit a solver to a model: the answer of a hundred evaluations in five.

A solver that takes one evaluation a step can only combine what it has seen. After evaluations
``v_0 .. v_n`` the next state is

    x_{n+1} = a_n x_n + sum_{j <= n} c_nj v_j

Euler, Adams-Bashforth and exponential integrators are choices of (a, c). Here they are chosen by
least squares: follow a reference trajectory x*(t) with many evaluations from the same noise; then,
for n = 0, 1, .., evaluate v_n at the state that the fitted solver has reached, and choose the n + 2
numbers so that x_{n+1} is nearest to x*(t_{n+1}) over all elements of all conditions. Later stages
thus correct the errors of earlier ones. Closed form, in fp64, no gradients, no change of weights.

*Times.* t = s u / (1 + (s - 1) u), u even in [0, 1], rounded to the steps of the reference; s is
searched in ``WARPS``: a poor s costs a factor of 3 to 5. *Shrinkage.* The least squares are damped
towards the Adams-Bashforth coefficients of the same times, by ``DAMPINGS`` of the scale of each
column: few conditions determine few numbers. Both are chosen on half of the conditions, fitted on
the other half; then all of these are fitted, and conditions held out from all of it measure the
error that is stored.

Memory: count + 2 states a condition, and twice that in fp64 for one batch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.flow import AdamsBashforth, FittedSolver, TimeGrid
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl
from blip3o_fast.progress import Progress
from blip3o_fast.sampling.cache import weights_digest
from blip3o_fast.sampling.inputs import starting_noise
from blip3o_fast.sampling.plan import SamplingPlan
from blip3o_fast.words import GridName

WARPS = (2 / 3, 1.0, 1.5, 2.0, 3.0, 4.0)
DAMPINGS = (1e-8, 1e-6, 1e-4)
REFERENCE_STEPS = 128
FEWEST_CONDITIONS = 4
BATCH = 8


Key = TypeVar("Key")


class Samples(NamedTuple):
    """Conditions with the reference's states at the nodes that the fit needs."""

    eva: Tensor
    nodes: dict[int, Tensor]

    def cut(self, count: int) -> tuple["Samples", "Samples"]:
        """The first ``count`` and the rest."""
        parts = (slice(count), slice(count, None))
        first, rest = (
            Samples(self.eva[part], {node: x[part] for node, x in self.nodes.items()})
            for part in parts
        )
        return first, rest

    def batches(self) -> Iterable["Samples"]:
        """A few at a time."""
        for start in range(0, len(self.eva), BATCH):
            part = slice(start, start + BATCH)
            yield Samples(self.eva[part], {node: x[part] for node, x in self.nodes.items()})


def fit_solver(
    model: DiT,
    eva: Tensor,
    *,
    evaluations: int,
    guidance_scale: float = 1.0,
    time_grid: GridName | Sequence[float] | None = None,
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
        time_grid: of the reference: a name, or increasing times from 0 to 1; None follows the
            conventions.
        reference: the sampler to reproduce; its steps are the times to choose from. None is the
            midpoint rule with 128 steps, or with those of ``time_grid``; on a published grid it is
            the published sampler: 50 steps of Heun on its own labels.
        generator: of the noise; None is torch's default.
        impl, dtype: of the velocities that are fitted, as in ``SamplingPlan``.

    Returns:
        The solver, for ``SamplingPlan(model, solver=fitted)``.

    Raises:
        ValueError: for too few conditions, for options that do not fit the model or each other, or
            where samples are not finite.
    """
    return fit_solvers(
        model,
        eva,
        evaluations=(evaluations,),
        guidance_scale=guidance_scale,
        time_grid=time_grid,
        reference=reference,
        generator=generator,
        impl=impl,
        dtype=dtype,
    )[evaluations]


def fit_solvers(
    model: DiT,
    eva: Tensor,
    *,
    evaluations: Iterable[int],
    guidance_scale: float = 1.0,
    time_grid: GridName | Sequence[float] | None = None,
    reference: SamplingPlan | None = None,
    generator: torch.Generator | None = None,
    impl: Impl | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict[int, FittedSolver]:
    """``fit_solver`` for several numbers of evaluations, which share the reference.

    ``progress`` shows how many evaluations are done, each of one sample.
    """
    counts = sorted(set(evaluations))
    if not counts or counts[0] < 1:
        raise ValueError(f"evaluations: expected numbers of at least 1, got {counts}")
    if len(eva) < FEWEST_CONDITIONS:
        raise ValueError(f"eva: expected at least {FEWEST_CONDITIONS} conditions, got {len(eva)}")
    if reference is not None and time_grid is not None:
        raise ValueError("time_grid: expected None beside a reference, which has a grid of its own")
    target = reference or default_reference(model, guidance_scale, time_grid)
    if target.model is not model or target.guidance_scale != guidance_scale:
        raise ValueError(
            "reference: expected a plan of the same model and guidance_scale "
            f"{guidance_scale:g}, got one with {target.guidance_scale:g}"
        )
    if len(target.grid) < counts[-1]:
        raise ValueError(
            f"evaluations: expected at most the {len(target.grid)} steps of the reference, "
            f"got {counts[-1]}"
        )
    nodes = {
        (count, warp): warped_nodes(len(target.grid), count, warp)
        for count in counts
        for warp in WARPS
    }
    held_out = max(1, len(eva) // 4)
    tries = len(WARPS) + len(DAMPINGS) - 1
    of_fits = sum(counts) * (tries * (len(eva) - held_out) + len(eva))
    bar = Progress("fit", of_fits + len(eva) * _cost(target), "evaluation", enabled=progress)
    fit = _Fit(model, target, dtype, impl, bar)

    def best(count: int) -> FittedSolver:
        @cache
        def error(warp: float, damping: float) -> float:
            return fit(fitting, choosing, nodes[count, warp], damping).error

        warp = min(WARPS, key=lambda warp: error(warp, DAMPINGS[0]))
        damping = min(DAMPINGS, key=lambda damping: error(warp, damping))
        return fit(known, unseen, nodes[count, warp], damping)

    with bar:
        wanted = {n for chosen in nodes.values() for n in chosen}
        samples = _follow(target, eva, wanted, generator, bar)
        known, unseen = samples.cut(len(eva) - held_out)
        fitting, choosing = known.cut((len(known.eva) + 1) // 2)
        return {count: best(count) for count in counts}


def default_reference(
    model: DiT,
    guidance_scale: float,
    time_grid: GridName | Sequence[float] | None = None,
) -> SamplingPlan:
    """What a fitted solver approximates unless told otherwise; see ``fit_solver``."""
    grid = model.config.rules.time_grid if time_grid is None else time_grid
    if not isinstance(grid, str):
        steps, solver = len(grid) - 1, "midpoint"
    else:
        steps, solver = (REFERENCE_STEPS, "midpoint") if grid == "ascending" else (50, "heun")
    return SamplingPlan(
        model, steps=steps, solver=solver, guidance_scale=guidance_scale, time_grid=grid
    )


def solver_errors(
    plans: Mapping[Key, SamplingPlan],
    reference: SamplingPlan,
    eva: Tensor,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> dict[Key, float]:
    """Relative error of the final state of each plan against the reference, from the same noise.

    Args:
        plans: of one model.
        reference: with many evaluations.
        eva: conditions ``[n, N, E]``, better none that a solver was fitted to.
        generator: of the noise.
        progress: shows how many evaluations are done, each of one sample.
    """
    last = len(reference.grid)
    total = len(eva) * sum(map(_cost, (reference, *plans.values())))
    with Progress("measure", total, "evaluation", enabled=progress) as bar:
        samples = _follow(reference, eva, {0, last}, generator, bar)
        return {key: _error(plan, samples, last, bar) for key, plan in plans.items()}


def _cost(plan: SamplingPlan) -> int:
    """Evaluations of the network for one sample."""
    return len(plan.solver.evaluations(plan.grid))


def warped_nodes(steps: int, count: int, warp: float) -> tuple[int, ...]:
    """Steps of the reference at which ``count`` evaluations begin, and its end."""
    even = np.linspace(0, 1, count + 1)
    nodes = np.rint(steps * warp * even / (1 + (warp - 1) * even)).astype(int)
    for i in range(1, count + 1):  # no two on one step
        nodes[i] = max(nodes[i], nodes[i - 1] + 1)
    for i in reversed(range(count + 1)):
        nodes[i] = min(nodes[i], steps - (count - i))
    return tuple(int(node) for node in nodes)


def _follow(
    target: SamplingPlan,
    eva: Tensor,
    wanted: set[int],
    generator: torch.Generator | None,
    bar: Progress,
) -> Samples:
    """The states of the reference at the wanted steps, from noise drawn here."""
    kept: dict[int, list[Tensor]] = {node: [] for node in sorted(wanted)}
    for part in eva.split(BATCH):
        noise = starting_noise(target.model, part, None, generator, None)
        kept[0].append(noise)

        def keep(step: int, x: Tensor) -> None:
            if step + 1 in kept:
                kept[step + 1].append(x)
            bar.update(len(x) * target.solver.evaluations_per_step)

        target(part, noise, callback=keep)
    return Samples(eva, {node: torch.cat(states) for node, states in kept.items()})


@dataclass(frozen=True)
class _Fit:
    """Fits of one model to one reference; ``dtype`` and ``impl`` are of the velocities."""

    model: DiT
    target: SamplingPlan
    dtype: torch.dtype | None
    impl: Impl | None
    bar: Progress

    def plan(self, solver: FittedSolver) -> SamplingPlan:
        """A sampler with that solver."""
        scale = self.target.guidance_scale
        return SamplingPlan(
            self.model, solver=solver, guidance_scale=scale, dtype=self.dtype, impl=self.impl
        )

    def start(self, nodes: tuple[int, ...]) -> FittedSolver:
        """Adams-Bashforth on the steps of the reference at ``nodes``."""
        grid, model = self.target.grid, self.model
        labels = tuple(grid.label(node, 0.0) for node in nodes[:-1])
        lengths = tuple(sum(grid.lengths[a:b]) for a, b in pairwise(nodes))
        own = TimeGrid(labels, lengths, clamp=grid.clamp)
        rows = AdamsBashforth(use="", order=4).slopes(own)
        solver = self.target.solver
        return FittedSolver(
            labels=labels,
            lengths=lengths,
            states=(1.0,) * len(labels),
            slopes=rows,
            clamp=grid.clamp,
            guidance_scale=self.target.guidance_scale,
            conventions=model.config.conventions,
            weights=weights_digest(model),
            dtype=str(self.dtype or model.dtype).removeprefix("torch."),
            reference=f"{len(grid) * solver.evaluations_per_step} evaluations",
            conditions=(0, 0),
            error=0.0,
            fitted_error=0.0,
        )

    @torch.no_grad()
    def __call__(
        self, known: Samples, unseen: Samples, nodes: tuple[int, ...], damping: float
    ) -> FittedSolver:
        """Fit stage by stage on ``known``, and measure on ``unseen``."""
        solver = self.start(nodes)
        plan = self.plan(solver)
        runs = [
            (batch, plan.start(batch.eva, batch.nodes[0].clone()), []) for batch in known.batches()
        ]
        states, slopes = [], []
        for n, node in enumerate(nodes[1:]):
            gram, moment = np.zeros((n + 2, n + 2)), np.zeros(n + 2)
            for batch, trajectory, seen in runs:
                trajectory.row.fill_(n)
                seen.append(trajectory.guided_slope())
                self.bar.update(len(batch.eva))
                columns = torch.stack([trajectory.x, *seen]).flatten(1).double()
                gram += (columns @ columns.T).cpu().numpy()
                moment += (columns @ batch.nodes[node].flatten().double()).cpu().numpy()
            if not np.isfinite(gram).all():
                raise ValueError(
                    f"fit_solver: expected finite states, got NaN or Inf in evaluation {n} of "
                    f"{len(nodes) - 1}; the model diverges between the steps of the reference"
                )
            weights = _damped(gram, moment, np.array([1.0, *solver.slopes[n]]), damping)
            for _, trajectory, seen in runs:
                x = weights[0] * trajectory.x
                for weight, v in zip(weights[1:], seen, strict=True):
                    x = x + weight * v
                bound = math.inf if solver.clamp is None else solver.clamp
                trajectory.x.copy_(x.clamp(-bound, bound))
            states.append(float(weights[0]))
            slopes.append(tuple(map(float, weights[1:])))
        reached = ((trajectory.x, batch.nodes[nodes[-1]]) for batch, trajectory, _ in runs)
        fitted = replace(
            solver,
            states=tuple(states),
            slopes=tuple(slopes),
            conditions=(len(known.eva), len(unseen.eva)),
            fitted_error=_relative_error(reached),
        )
        return replace(fitted, error=_error(self.plan(fitted), unseen, nodes[-1], self.bar))


@torch.no_grad()
def _error(plan: SamplingPlan, samples: Samples, last: int, bar: Progress) -> float:
    """Relative error of the final states at step ``last`` of the reference."""

    def reached() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in samples.batches():
            trajectory = plan.start(batch.eva, batch.nodes[0].clone())
            for _ in plan.solver.evaluations(plan.grid):
                trajectory.advance()
                bar.update(len(batch.eva))
            yield trajectory.x, batch.nodes[last]

    return _relative_error(reached())


def _relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The distance of all states from their targets over the targets' norm; inf if not finite."""
    wrong = right = 0.0
    for state, target in pairs:
        wrong += (state - target).double().square().sum().item()
        right += target.double().square().sum().item()
    error = (wrong / right) ** 0.5
    return error if math.isfinite(error) else math.inf


def _damped(
    gram: np.ndarray, moment: np.ndarray, towards: np.ndarray, damping: float
) -> np.ndarray:
    """Least squares by normal equations, pulled towards numbers that are known to be good."""
    pull = damping * np.diag(np.diag(gram))
    return np.linalg.lstsq(gram + pull, moment + pull @ towards, rcond=None)[0]
