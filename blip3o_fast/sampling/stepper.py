"""One step of a solver as a function of buffers alone.

Which step it is stands in a counter on the device; the step's length, the weights of the state in
its velocities and the rows of the modulation table that its evaluations use are read there. The
function therefore takes no argument that changes from step to step, and one CUDA graph of it serves
any number of steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.schedule import TimeGrid
from blip3o_fast.flow.solvers import AdamsBashforth2, Solver, Step
from blip3o_fast.sampling.conditioning import Context
from blip3o_fast.sampling.modulation import LinearGuess, Sites, site_modulations

Evaluate = Callable[[Tensor, Context, Sites], Tensor]
"""``(state, context, sites) -> velocity`` with weights and implementations already chosen."""


class StepTable(NamedTuple):
    """What the steps of a grid read, indexed by step.

    ``modulations`` is ``[T, sites, 2, D]``; ``rows`` ``[S, evaluations]`` (int64) indexes it.
    ``scalars`` is ``[S, 2]`` or ``[S, 2 + 2 evaluations]``: a step's length dt, that length over
    the one before (0 at first), and the weights of ``LinearGuess`` for each of its evaluations.
    """

    modulations: Tensor
    rows: Tensor
    scalars: Tensor


@dataclass(frozen=True)
class Method:
    """How a step is taken: solver, guidance weight, and bound on the state."""

    solver: Solver
    guidance_scale: float = 1.0
    clamp: float | None = None

    @property
    def guided(self) -> bool:
        """Whether both halves of guidance are evaluated."""
        return self.guidance_scale != 1.0

    @property
    def multistep(self) -> bool:
        """Whether a step needs the slope of the step before."""
        return isinstance(self.solver, AdamsBashforth2)


def grid_times(grid: TimeGrid, solver: Solver) -> tuple[tuple[float, ...], list[list[int]]]:
    """Distinct times of a grid in the order of their first use, and their index by evaluation."""
    order: dict[float, int] = {}
    rows = [
        [order.setdefault(time, len(order)) for time in grid.step(i, solver.fractions).times]
        for i in range(len(grid))
    ]
    return tuple(order), rows


def step_table(
    modulations: Tensor,
    guesses: Tensor | None,
    grid: TimeGrid,
    rows: list[list[int]],
    dtype: torch.dtype,
) -> StepTable:
    """The table of a whole grid; ``guesses`` ``[T, 2]``; ``dtype`` is that of the state."""
    device = modulations.device
    index = torch.tensor(rows, device=device)
    ratios = [0.0] + [grid.step(i, ()).ratio for i in range(1, len(grid))]
    scalars = torch.tensor((grid.lengths, ratios), device=device, dtype=dtype).T
    if guesses is not None:
        scalars = torch.cat((scalars, guesses.to(dtype)[index].flatten(1)), dim=1)
    return StepTable(modulations, index, scalars.contiguous())


class Stepper:
    """A batch on its way from noise to data: its buffers, and ``advance``.

    Args:
        evaluate: the velocity.
        norms: w1 of every site.
        method: solver, guidance and clamp.
        table: of the grid.
        state: noise ``[B, N, C]``, fp32 or fp64; overwritten step by step.
        context: of a batch B' (2B with guidance).
        impl: of ``ops.solver_update``.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        norms: tuple[Tensor, ...],
        method: Method,
        table: StepTable,
        state: Tensor,
        context: Context,
        impl: ops.Impl | None,
    ) -> None:
        batch, L = context.keys_values.shape[:2]
        self.evaluate, self.method, self.table, self.impl = evaluate, method, table, impl
        self.state, self.context = state, context
        self.counter = torch.zeros(1, dtype=torch.int64, device=state.device)
        past = state.new_zeros(batch, *state.shape[1:]) if method.multistep else None
        self.past = past
        evaluations, numbers = table.rows.shape[1], table.scalars.shape[1]
        self.rows = table.modulations.new_empty(evaluations, *table.modulations.shape[1:])
        self.scalars = table.scalars.new_empty(1, numbers)
        self.dt, self.ratio = self.scalars[0, :2]
        guesses = [LinearGuess(*pair) for pair in self.scalars[0, 2:].view(-1, 2)]
        self.sites = [
            site_modulations(norms, row, guess, 3 * L, batch)
            for row, guess in zip(self.rows, guesses or [None] * evaluations, strict=True)
        ]

    def advance(self) -> None:
        """Take the step that ``counter`` names, and count it."""
        table, counter = self.table, self.counter
        # One evaluation a step: all times are distinct, so the step is the row.
        alone = len(self.sites) == 1
        row = counter if alone else table.rows.index_select(0, counter)[0]
        torch.index_select(table.modulations, 0, row, out=self.rows)
        torch.index_select(table.scalars, 0, counter, out=self.scalars)
        # The solver passes on what it is told are times: here, which evaluation of the step it is.
        stages = tuple(range(len(self.sites)))
        x, past = self.method.solver.step(
            self._velocity, self._update, self.state, Step(stages, self.dt), self.past
        )
        kept, new = [self.state], [x]
        if self.past is not None and past is not None:
            kept, new = [*kept, self.past], [*new, past]
        torch._foreach_copy_(kept, new)  # pyright: ignore[reportPrivateImportUsage]
        self.counter += 1

    def _velocity(self, x: Tensor, stage: float) -> Tensor:
        return self.evaluate(x, self.context, self.sites[int(stage)])

    def _update(
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
        if self.past is not None and previous is not None:
            # Two-step coefficients change with the ratio r of step lengths. Those of an even grid
            # serve all steps if the slope before is moved to where an even grid would have it:
            # r = 1 leaves it, r = 0 (the first step) makes it the present slope, hence Euler.
            velocity = velocity.to(previous.dtype)
            previous = torch.lerp(velocity, previous, self.ratio)
        return ops.solver_update(
            x,
            velocity,
            dt,
            previous=previous,
            weight=weight,
            previous_weight=previous_weight,
            guidance_scale=self.method.guidance_scale,
            clamp=self.method.clamp if final else None,
            impl=self.impl,
        )
