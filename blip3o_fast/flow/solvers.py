"""Explicit one- and two-evaluation solvers of ``dx/dt = v(x, t)``.

A solver knows neither network nor grid: it is given the velocity field, the state and one ``Step``
of a grid. The state is fp32; ``ops.solver_update`` forms every linear combination in one pass,
including guidance, which is linear and therefore commutes with the solver's weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""``velocity(x, t) -> v``: state ``[B, N, C]`` and time label to slope."""

SolverName = Literal["euler", "heun", "midpoint", "adams_bashforth2"]


class Step(NamedTuple):
    """One step of a grid, as a solver sees it.

    ``times`` are the labels of its evaluations, ``dt`` its length (a number, or a 0-d tensor on the
    device of the state), ``ratio`` its length over that of the step before.
    """

    times: tuple[float, ...]
    dt: Tensor | float
    ratio: float = 1.0


class Update(Protocol):
    """``ops.solver_update`` with guidance, clamp and implementation already chosen."""

    def __call__(
        self,
        x: Tensor,
        velocity: Tensor,
        dt: Tensor | float,
        *,
        previous: Tensor | None = None,
        weight: float = 1.0,
        previous_weight: float = 0.0,
        final: bool = False,
    ) -> Tensor:
        """``final`` marks the update that ends a step."""
        ...


class Solver(Protocol):
    """An explicit method."""

    @property
    def fractions(self) -> tuple[float, ...]:
        """Where in a step each evaluation lies, from 0 to 1."""
        ...

    def step(
        self, velocity: Velocity, update: Update, x: Tensor, step: Step, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Advance ``x``; ``past`` is what the step before returned beside its state."""
        ...


@dataclass(frozen=True)
class Euler:
    """Order 1, one evaluation: ``x' = x + dt v(x, t)``."""

    fractions: tuple[float, ...] = (0.0,)

    def step(
        self, velocity: Velocity, update: Update, x: Tensor, step: Step, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``x' = x + dt v``."""
        del past
        return update(x, velocity(x, step.times[0]), step.dt, final=True), None


@dataclass(frozen=True)
class Heun:
    """Order 2, two evaluations: average the slopes at both ends of an Euler step."""

    fractions: tuple[float, ...] = (0.0, 1.0)

    def step(
        self, velocity: Velocity, update: Update, x: Tensor, step: Step, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``x' = x + dt (v1 + v2) / 2`` with ``v2 = v(x + dt v1, t + dt)``."""
        del past
        v1 = velocity(x, step.times[0])
        v2 = velocity(update(x, v1, step.dt), step.times[1])
        x = update(x, v2, step.dt, previous=v1, weight=0.5, previous_weight=0.5, final=True)
        return x, None


@dataclass(frozen=True)
class Midpoint:
    """Order 2, two evaluations: the slope half-way serves the whole step."""

    fractions: tuple[float, ...] = (0.0, 0.5)

    def step(
        self, velocity: Velocity, update: Update, x: Tensor, step: Step, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``x' = x + dt v(x + dt v1 / 2, t + dt / 2)``."""
        del past
        v1 = velocity(x, step.times[0])
        v2 = velocity(update(x, v1, step.dt, weight=0.5), step.times[1])
        return update(x, v2, step.dt, final=True), None


@dataclass(frozen=True)
class AdamsBashforth2:
    """Order 2, one evaluation: extrapolate through the slope of the step before.

    With r the ratio of step lengths, ``x' = x + dt ((1 + r/2) v - (r/2) v_before)``. The first step
    is Euler's: a single local error of order dt^2 leaves the global order at 2.
    """

    fractions: tuple[float, ...] = (0.0,)

    def step(
        self, velocity: Velocity, update: Update, x: Tensor, step: Step, past: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``x' = x + dt ((1 + r/2) v - (r/2) v_before)``."""
        v = velocity(x, step.times[0])
        if past is None:
            return update(x, v, step.dt, final=True), v
        half = step.ratio / 2
        x = update(x, v, step.dt, previous=past, weight=1 + half, previous_weight=-half, final=True)
        return x, v


SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "heun": Heun(),
    "midpoint": Midpoint(),
    "adams_bashforth2": AdamsBashforth2(),
}


def find_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {name!r}")
    return SOLVERS[name]
