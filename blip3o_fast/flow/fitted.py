"""A solver whose coefficients were fitted to one model, as data.

Few evaluations can be combined better than Taylor expansion says, once one knows the velocity
field: ``sampling.fit`` chooses the coefficients by least squares. Related: non-stationary solvers
(arXiv:2403.01329) find such coefficients by gradient descent through the sampler, DPM-Solver-v3
(arXiv:2310.13268) fits statistics of a model.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_fast.atomic import write_json
from blip3o_fast.checked import read_json
from blip3o_fast.flow.schedule import TimeGrid
from blip3o_fast.flow.solvers import Evaluation
from blip3o_fast.untrusted import reading

SOLVER_NAME = "solver.json"
FORMAT_VERSION = 1
_ROWS = ("labels", "lengths", "states")


@dataclass(frozen=True)
class FittedSolver:
    """One evaluation a step: times and coefficients, and what they were fitted for.

    After evaluation n the state moves to ``states[n] x_n + sum_j slopes[n][j] v_j``, j <= n.

    Attributes:
        labels: the time that the network is told in each evaluation.
        lengths: length of each step; they sum to 1.
        states: coefficient of the present state, by evaluation.
        slopes: coefficients of the slopes so far, by evaluation: n + 1 numbers for evaluation n.
        clamp: bound on the state's magnitude after every step, or None.
        guidance_scale: that it was fitted for.
        conventions: of the model.
        weights: digest of the model's weights.
        dtype: in which the velocities were computed.
        reference: the sampler whose final state it approximates, and with how many evaluations.
        conditions: how many were fitted, and how many measure the error.
        error: relative error of the final state on conditions that were not fitted.
        fitted_error: the same on those that were.
    """

    labels: tuple[float, ...]
    lengths: tuple[float, ...]
    states: tuple[float, ...]
    slopes: tuple[tuple[float, ...], ...]
    clamp: float | None
    guidance_scale: float
    conventions: str
    weights: str
    dtype: str
    reference: str
    conditions: tuple[int, int]
    error: float
    fitted_error: float

    evaluations_per_step = 1
    use = "the fewest evaluations for the model that it was fitted to"

    def __post_init__(self) -> None:
        count = len(self.labels)
        numbers = [
            *self.labels,
            *self.lengths,
            *self.states,
            *(c for row in self.slopes for c in row),
        ]
        shapes = (len(self.lengths), len(self.states), len(self.slopes))
        if not count or set(shapes) != {count} or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"fitted solver: expected {count} finite lengths, states and rows of slopes, one "
                f"for each label, got {shapes}"
            )
        for n, row in enumerate(self.slopes):
            if len(row) != n + 1:
                raise ValueError(
                    f"fitted solver: expected {n + 1} slopes in row {n}, got {len(row)}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def grid(self) -> TimeGrid:
        """Its steps."""
        return TimeGrid(self.labels, self.lengths, clamp=self.clamp)

    def evaluations(self, grid: TimeGrid) -> list[Evaluation]:
        """All evaluations; ``grid`` must be its own."""
        if grid != self.grid:
            raise ValueError("time_grid: a fitted solver has times of its own, expected None")
        slots = len(self) - 1
        return [
            Evaluation(
                label=label,
                state=self.states[n],
                newest=self.slopes[n][n],
                kept=(*self.slopes[n][:n], *[0.0] * (slots - n)),
                slot=n if n < slots else -1,
                ends_step=True,
            )
            for n, label in enumerate(self.labels)
        ]

    def check(self, *, conventions: str, guidance_scale: float, weights: str) -> None:
        """Raise ``ValueError`` if it was fitted for something else, naming both."""
        asked = {"conventions": conventions, "guidance_scale": guidance_scale, "weights": weights}
        for name, value in asked.items():
            own = getattr(self, name)
            if own != value:
                raise ValueError(
                    f"solver: fitted for {name} {_shown(own)}, got a plan with {_shown(value)}; "
                    "fit one for it with fit_solver, or use another solver"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of all fields."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, and a digest of them."""
        return {**dataclasses.asdict(self), "digest": self.digest}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "FittedSolver":
        """Read what ``to_dict`` wrote.

        Raises:
            ValueError: on a missing, unknown or malformed field, and where a value is not the one
                that was written: the stored error would be that of another solver.
        """
        names = {"digest", *(field.name for field in dataclasses.fields(cls))}
        if set(fields) != names:
            raise ValueError(
                f"fitted solver: expected the fields {', '.join(sorted(names))}, "
                f"got {', '.join(sorted(map(str, fields)))}"
            )
        kept = {name: value for name, value in fields.items() if name != "digest"}
        try:
            read = {
                **kept,
                **{
                    name: tuple(map(float, fields[name]))
                    for name in ("labels", "lengths", "states")
                },
                "slopes": tuple(tuple(map(float, row)) for row in fields["slopes"]),
                "conditions": tuple(map(int, fields["conditions"])),
            }
        except (TypeError, ValueError) as error:
            raise ValueError(f"fitted solver: expected lists of numbers ({error})") from None
        solver = cls(**read)
        if fields["digest"] != solver.digest:
            raise ValueError(
                "fitted solver: expected what fit_solver wrote, got values that were changed "
                "since; fit it again"
            )
        return solver

    def save(self, folder: str | Path) -> None:
        """Add it to ``solver.json`` in the folder of its model, in place of one as long."""
        path = Path(folder) / SOLVER_NAME
        others = load_solvers(folder) if path.is_file() else {}
        save_solvers(folder, {**others, len(self): self})

    @classmethod
    def load(cls, folder: str | Path, evaluations: int) -> "FittedSolver":
        """The solver of so many evaluations from ``solver.json``.

        Raises:
            ValueError: if there is none, naming those that there are.
        """
        return choose_fitted(load_solvers(folder), evaluations)


def choose_fitted(solvers: dict[int, FittedSolver], evaluations: int | None) -> FittedSolver:
    """The solver of so many evaluations.

    Raises:
        ValueError: if there is none, naming those that there are.
    """
    if evaluations is None or evaluations not in solvers:
        known = ", ".join(map(str, sorted(solvers))) or "none"
        raise ValueError(
            f"solver: expected a fitted solver of {evaluations} evaluations, the model has those "
            f"of {known}; fit one with fit_solver or 'blip3o-fast fit-solver'"
        )
    return solvers[evaluations]


def save_solvers(folder: str | Path, solvers: dict[int, FittedSolver]) -> None:
    """Write ``solver.json``, complete or not at all."""
    path = Path(folder) / SOLVER_NAME
    rows = [solvers[count].to_dict() for count in sorted(solvers)]
    write_json(path, {"format_version": FORMAT_VERSION, "solvers": rows})


def load_solvers(folder: str | Path) -> dict[int, FittedSolver]:
    """The solvers of ``solver.json``, by their number of evaluations.

    Raises:
        ValueError: if the file is not what ``save_solvers`` writes.
    """
    path = Path(folder) / SOLVER_NAME
    with reading(path, "fitted solvers"):
        content = read_json(path)
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version: expected {FORMAT_VERSION}")
        solvers = [FittedSolver.from_dict(fields) for fields in content["solvers"]]
    return {len(solver): solver for solver in solvers}


def _shown(value: object) -> str:
    return value[:12] if isinstance(value, str) else f"{value:g}"
