"""The record of an evaluation: the DiT at several numbers of evaluations beside the baselines."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip3o_fast.evaluation.metrics import Metrics, SampleScores
from blip3o_fast.evaluation.verdict import Verdict, judge

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Result:
    """One method on the held-out samples.

    Attributes:
        metrics, scores: of all samples, and by sample.
        evaluations: calls of the network; None for a baseline.
        solver_error: of a fitted solver: relative error of its final states, on conditions held out
            when it was fitted.
    """

    metrics: Metrics
    scores: SampleScores
    evaluations: int | None = None
    solver_error: float | None = None


@dataclass(frozen=True, eq=False)
class Photo:
    """One sample to show.

    ``cosines`` is its token cosine on the patch grid ``[h, w]`` (``token_map``); ``image`` is the
    crop that was encoded, ``[height, width, 3]`` uint8, or None.
    """

    key: str
    cosines: NDArray[Any]
    image: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """Everything the report shows.

    Attributes:
        title: heading of the page.
        mean: the mean predictor.
        ridge: tuned ridge regression.
        dit: the DiT, by rising number of evaluations.
        fitted: the DiT with solvers that were fitted to it, by rising number of evaluations.
        regression: the same network trained as a plain regression, in one evaluation; None where
            there is none.
        grid: (depth, height, width) of the patches.
        facts: name to value, shown as they are: model, data, device, settings.
        history: (step, training loss) pairs, empty where unknown.
        photos: samples to show, with maps of the DiT at its best number of evaluations.

    Raises:
        ValueError: if the results are not of the same samples, or a map or a photo does not fit.
    """

    title: str
    mean: Result
    ridge: Result
    dit: tuple[Result, ...]
    grid: tuple[int, int, int]
    facts: Mapping[str, str] = field(default_factory=dict)
    history: tuple[tuple[int, float], ...] = ()
    photos: tuple[Photo, ...] = ()
    fitted: tuple[Result, ...] = ()
    regression: Result | None = None

    def __post_init__(self) -> None:
        if not self.dit:
            raise ValueError("dit: expected results with evaluations >= 1, got []")
        for name, results in (("dit", self.dit), ("fitted", self.fitted)):
            counts = [result.evaluations for result in results]
            if any(n is None or n < 1 for n in counts):
                raise ValueError(f"{name}: expected results with evaluations >= 1, got {counts}")
            if counts != sorted(set(counts), key=lambda n: n or 0):
                raise ValueError(f"{name}: expected rising numbers of evaluations, got {counts}")
        keys = self.mean.scores.keys
        for _, result in self.methods:
            if result.scores.keys != keys:
                raise ValueError(
                    "results: expected every method on the same samples in the same order"
                )
        self._check_maps(frozenset(keys))

    @property
    def best(self) -> Result:
        """The DiT at the number of evaluations with the highest mean token cosine."""
        return max(self.dit, key=lambda result: result.metrics.token_cosine.value)

    @property
    def methods(self) -> tuple[tuple[str, Result], ...]:
        """Short names and results: ``mean``, ``ridge``, ``dit_1``, ``dit_2``, ``fitted_5``, ..."""
        curves = ("dit", self.dit), ("fitted", self.fitted)
        return (
            ("mean", self.mean),
            ("ridge", self.ridge),
            *([] if self.regression is None else [("regression", self.regression)]),
            *((f"{name}_{result.evaluations}", result) for name, of in curves for result in of),
        )

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the DiT at its best beats the baselines, with a paired interval."""
        best = self.best
        assert best.evaluations is not None
        return judge(
            best.scores,
            self.ridge.scores,
            self.mean.scores,
            evaluations=best.evaluations,
            confidence=best.metrics.confidence,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready contents of ``report.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "verdict": self.verdict.to_dict(),
            "best_evaluations": self.best.evaluations,
            "mean_predictor": self.mean.metrics.to_dict(),
            "ridge": self.ridge.metrics.to_dict(),
            "regression": None if self.regression is None else self.regression.metrics.to_dict(),
            "dit": [
                {"evaluations": result.evaluations, **result.metrics.to_dict()}
                for result in self.dit
            ],
            "fitted": [
                {
                    "evaluations": result.evaluations,
                    "solver_error": result.solver_error,
                    **result.metrics.to_dict(),
                }
                for result in self.fitted
            ],
            "grid": list(self.grid),
            "facts": dict(self.facts),
            "history": [[step, loss] for step, loss in self.history],
            "photos": [{"key": p.key, "cosines": p.cosines.tolist()} for p in self.photos],
        }

    def _check_maps(self, keys: frozenset[str]) -> None:
        depth, height, width = self.grid
        tokens = self.best.metrics.tokens
        if depth * height * width != tokens:
            raise ValueError(f"grid: expected {tokens} patches, got {self.grid}")
        for photo in self.photos:
            if photo.key not in keys:
                raise ValueError(f"photos: expected evaluated samples, got {photo.key!r}")
            if photo.cosines.shape != (height, width):
                raise ValueError(
                    f"photos: expected maps of {height} x {width}, got {photo.cosines.shape}"
                )
            if photo.image is not None and (
                photo.image.dtype != np.uint8 or photo.image.ndim != 3 or photo.image.shape[2] != 3
            ):
                raise ValueError(
                    f"photos: expected uint8 images [height, width, 3], got {photo.image.dtype} "
                    f"{list(photo.image.shape)}"
                )


def token_map(values: NDArray[Any], grid: tuple[int, int, int]) -> NDArray[Any]:
    """Arrange one value per patch ``[N]`` on its ``[height, width]`` grid, averaged over depth."""
    if values.shape != (grid[0] * grid[1] * grid[2],):
        raise ValueError(f"values: expected one per patch of grid {grid}, got {list(values.shape)}")
    return values.reshape(grid).mean(0)


def spread_samples(scores: SampleScores, count: int) -> tuple[int, ...]:
    """Indices of ``count`` samples evenly spaced by token cosine, worst first.

    Shows the range of results, where a hand-picked selection would show the best of them.
    """
    order = np.argsort(scores.token_cosine, kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return tuple(int(i) for i in order[ranks])
