"""Solvers of ``dx/dt = v(x, t)`` as data.

Every explicit solver is a list of evaluations. Evaluation i computes ``v_i = v(x_i, t_i)`` at the
present state, and the state moves to

    x_{i+1} = a_i x_i + sum_{j <= i} c_ij v_j

A solver is therefore the times t_i and the numbers (a_i, c_ij). The loop (``flow.trajectory``) and
``ops.solver_update`` know nothing else. A Butcher tableau gives them for Runge-Kutta methods, an
order for Adams-Bashforth methods. Adding a solver is adding one entry to ``SOLVERS``.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from blip3o_fast.flow.schedule import TimeGrid


class Evaluation(NamedTuple):
    """One evaluation of the velocity, and how the state moves after it.

    Attributes:
        label: the time that the network is told.
        state: coefficient a of the present state.
        newest: coefficient of the slope that this evaluation computes.
        kept: coefficients of the slopes that earlier evaluations kept, by slot ``[R]``.
        slot: where this slope is kept, after ``kept`` was read; -1: it is not needed again.
        ends_step: whether the state is now at the end of a step of the grid.
    """

    label: float
    state: float
    newest: float
    kept: tuple[float, ...]
    slot: int
    ends_step: bool


class Solver(Protocol):
    """What a solver is to those who use it."""

    @property
    def use(self) -> str:
        """When to choose it, in one sentence."""
        ...

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the network that one step of a grid costs."""
        ...

    def evaluations(self, grid: TimeGrid) -> list[Evaluation]:
        """All evaluations of a grid, in order."""
        ...


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method by its Butcher tableau (Hairer, Norsett, Wanner, II.1).

    Attributes:
        use: when to choose it.
        fractions: c, where in a step each evaluation lies, from 0 to 1.
        stages: a, one row for each evaluation after the first.
        weights: b, of the slopes in the step.
    """

    use: str
    fractions: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    @property
    def evaluations_per_step(self) -> int:
        """The number of stages."""
        return len(self.fractions)

    def evaluations(self, grid: TimeGrid) -> list[Evaluation]:
        """The state moves from stage to stage, so each stage takes back what the last one added."""
        count = self.evaluations_per_step
        rows = np.zeros((count + 1, count))
        for i, row in enumerate((*self.stages, self.weights), start=1):
            rows[i, : len(row)] = row
        moves = np.diff(rows, axis=0)
        return [
            Evaluation(
                label=grid.label(step, fraction),
                state=1.0,
                newest=float(dt * moves[i, i]),
                kept=tuple(float(c) for c in dt * np.where(np.arange(count) < i, moves[i], 0))[:-1],
                slot=i if i < count - 1 else -1,
                ends_step=i == count - 1,
            )
            for step, dt in enumerate(grid.lengths)
            for i, fraction in enumerate(self.fractions)
        ]


@dataclass(frozen=True)
class AdamsBashforth:
    """The explicit multistep method of an order, for steps of any lengths (Hairer et al., III.1).

    The slope is extrapolated by the polynomial through the last ``order`` slopes. The first steps
    have fewer slopes and use lower orders; on an even grid their error, of order 2, is what remains
    when the steps are many.

    Attributes:
        use: when to choose it.
        order: number of slopes a step combines, at least 1.
    """

    use: str
    order: int
    evaluations_per_step: int = 1

    def slopes(self, grid: TimeGrid) -> tuple[tuple[float, ...], ...]:
        """For each step the coefficients of all slopes so far, the newest last."""
        starts = np.concatenate(([0.0], np.cumsum(grid.lengths)))
        rows = []
        for step, dt in enumerate(grid.lengths):
            first = max(0, step + 1 - self.order)
            weights = _extrapolation((starts[first : step + 1] - starts[step]) / dt)
            rows.append((*[0.0] * first, *(dt * weight for weight in weights)))
        return tuple(rows)

    def evaluations(self, grid: TimeGrid) -> list[Evaluation]:
        """Slopes are kept in a ring of ``order - 1`` slots, each over the oldest."""
        slots = self.order - 1
        evaluations = []
        for step, (*earlier, newest) in enumerate(self.slopes(grid)):
            kept = [0.0] * slots
            for before in range(max(0, step - slots), step):
                kept[before % slots] = earlier[before]
            evaluations.append(
                Evaluation(
                    label=grid.label(step, 0.0),
                    state=1.0,
                    newest=newest,
                    kept=tuple(kept),
                    slot=step % slots if slots else -1,
                    ends_step=True,
                )
            )
        return evaluations


def _extrapolation(nodes: np.ndarray) -> list[float]:
    """Weights with which values at ``nodes`` integrate their polynomial from 0 to 1."""
    powers = np.arange(len(nodes))
    return np.linalg.solve(nodes[None, :] ** powers[:, None], 1 / (powers + 1)).tolist()


SOLVERS: dict[str, Solver] = {
    "euler": RungeKutta(
        use="order 1, one evaluation a step; with a single step it gives the conditional mean",
        fractions=(0.0,),
        stages=(),
        weights=(1.0,),
    ),
    "heun": RungeKutta(
        use="order 2, two evaluations a step; the published sampler and the default",
        fractions=(0.0, 1.0),
        stages=((1.0,),),
        weights=(0.5, 0.5),
    ),
    "midpoint": RungeKutta(
        use="order 2, two evaluations a step; often a little more exact than heun",
        fractions=(0.0, 0.5),
        stages=((0.5,),),
        weights=(0.0, 1.0),
    ),
    "rk4": RungeKutta(
        use="order 4, four evaluations a step; for references with many evaluations",
        fractions=(0.0, 0.5, 0.5, 1.0),
        stages=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    "adams_bashforth2": AdamsBashforth(
        use="order 2, one evaluation a step; as exact as heun for fewer evaluations", order=2
    ),
    "adams_bashforth3": AdamsBashforth(
        use="order 3 after its first steps, one evaluation a step", order=3
    ),
    "adams_bashforth4": AdamsBashforth(
        use="order 4 after its first steps, one evaluation a step; for smooth velocities", order=4
    ),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]
