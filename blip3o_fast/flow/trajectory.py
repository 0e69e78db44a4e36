"""The loop from noise to data.

    for i in range(len(table)):
        v = velocity(x, row i)
        x = a_i x + sum_j c_ij v_j

All numbers that change from one evaluation to the next are in a table on the device. A counter on
the device says which row is next. So ``Trajectory.advance`` takes no arguments, and one CUDA graph
of it serves every solver and every number of steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.flow.schedule import TimeGrid
from blip3o_fast.flow.solvers import Evaluation


class Row(NamedTuple):
    """The part of a table's row that the velocity reads.

    ``numbers`` ``[K]`` and ``places`` ``[P]`` (int64) are the columns that were added for it.
    """

    numbers: Tensor
    places: Tensor


Velocity = Callable[[Tensor, Row], Tensor]
"""``velocity(x, row) -> v``: state ``[B, N, C]`` to slope, ``[2B, N, C]`` with guidance."""

Callback = Callable[[int, Tensor], None]
"""``callback(step, x)`` after each step, counted from 0; it must not modify ``x`` ``[B, N, C]``."""


class SolverTable(NamedTuple):
    """All evaluations of a solver on a grid, one in each row, on the device of the state.

    Attributes:
        numbers: ``[n, R + 3 + K]`` in the dtype of the state: the bound on the new state, the
            coefficients of the state, of the newest slope and of the R kept slopes, then the
            columns of the velocity.
        places: ``[n, 1 + P]`` int64: the slot that keeps the slope, then those of the velocity.
        slots: R.
    """

    numbers: Tensor
    places: Tensor
    slots: int


def solver_table(
    evaluations: Sequence[Evaluation],
    grid: TimeGrid,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    numbers: Tensor | None = None,
    places: Tensor | None = None,
) -> SolverTable:
    """Put evaluations on a device.

    Args:
        evaluations: of a solver on ``grid``.
        grid: gives the bound that holds at the end of each step.
        device, dtype: of the state.
        numbers: ``[n, K]``, columns for the velocity; None: the time label, K = 1.
        places: ``[n, P]``, columns for the velocity; None: P = 0.
    """
    bound = math.inf if grid.clamp is None else grid.clamp
    rows = [(bound if e.ends_step else math.inf, e.state, e.newest, *e.kept) for e in evaluations]
    if numbers is None:
        numbers = torch.tensor([[e.label] for e in evaluations], dtype=dtype, device=device)
    coefficients = torch.tensor(rows, dtype=dtype, device=device)
    slots = torch.tensor([[e.slot] for e in evaluations], device=device)
    return SolverTable(
        torch.cat((coefficients, numbers.to(coefficients)), dim=1),
        slots if places is None else torch.cat((slots, places), dim=1),
        len(evaluations[0].kept),
    )


class Trajectory:
    """A batch on its way from noise to data: its state, its slopes, and ``advance``.

    Args:
        velocity: from state and row to slope.
        table: of the solver. ``row`` says which of its rows is next.
        x: noise ``[B, N, C]``, fp32 or fp64; ``advance`` overwrites it with the state.
        guidance_scale: 1 is no guidance; otherwise the velocity returns both halves.
        impl: of ``ops.solver_update``.
    """

    def __init__(
        self,
        velocity: Velocity,
        table: SolverTable,
        x: Tensor,
        *,
        guidance_scale: float = 1.0,
        impl: ops.Impl | None = None,
    ) -> None:
        self.velocity, self.table, self.x = velocity, table, x
        self.guidance_scale, self.impl = guidance_scale, impl
        self.slopes = x.new_zeros(table.slots, *x.shape)
        self.row = torch.zeros(1, dtype=torch.int64, device=x.device)

    def advance(self) -> None:
        """One evaluation of the velocity, and the move that it allows."""
        coefficients, slot, row = self._read()
        ops.solver_update(
            self.x,
            self.velocity(self.x, row),
            self.slopes,
            coefficients[1:],
            slot=slot,
            clamp=coefficients[:1],
            guidance_scale=self.guidance_scale,
            out=self.x,
            impl=self.impl,
        )
        self.row += 1

    def slope(self) -> Tensor:
        """The velocity at the present state, without a move."""
        return self.velocity(self.x, self._read()[2])

    def guided_slope(self) -> Tensor:
        """The velocity as the solver combines it: in the dtype of the state, guided."""
        v = self.slope().to(self.x.dtype)
        if self.guidance_scale == 1.0:
            return v
        conditional, unconditional = v.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _read(self) -> tuple[Tensor, Tensor, Row]:
        """The next row: its bound and coefficients, its slot, and the velocity's part."""
        own = self.table.slots + 3
        numbers = self.table.numbers.index_select(0, self.row)[0]
        places = self.table.places.index_select(0, self.row)[0]
        return numbers[:own], places[:1], Row(numbers[own:], places[1:])
