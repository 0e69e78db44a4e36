"""The comparison table: its rows, shared by the terminal and the page, and its plain-text form."""

import textwrap
from typing import NamedTuple

from blip3o_fast.evaluation.bootstrap import Estimate
from blip3o_fast.evaluation.metrics import Metrics
from blip3o_fast.evaluation.report import Report
from blip3o_fast.quantities import count
from blip3o_fast.report.columns import align

MOST_ROWS = 8
"""Up to so many rows of the DiT are all shown; of more, only the usual numbers of evaluations."""
USUAL_EVALUATIONS = (1, 2, 4, 10, 25, 50, 100)
HEADER = ("method", "token cosine", "image", "centred", "MSE", "R2", "R@1", "CKA")

_WIDTH = 80


class Row(NamedTuple):
    """A method and its seven cells, as text."""

    method: str
    cells: tuple[str, ...]
    is_best: bool = False


def comparison_rows(report: Report) -> tuple[Row, ...]:
    """Baselines, the DiT by number of evaluations, with fitted solvers, and at its best."""
    rows = [
        Row("mean predictor", metric_cells(report.mean.metrics)),
        Row("ridge", metric_cells(report.ridge.metrics)),
    ]
    if report.regression is not None:
        rows.append(Row("regression", metric_cells(report.regression.metrics)))
    for result in report.dit:
        if len(report.dit) <= MOST_ROWS or result.evaluations in USUAL_EVALUATIONS:
            assert result.evaluations is not None
            called = count(result.evaluations, "eval")
            rows.append(Row(f"DiT, {called}", metric_cells(result.metrics)))
    rows += [
        Row(f"fitted ({result.evaluations})", metric_cells(result.metrics))
        for result in report.fitted
    ]
    best = report.best
    rows.append(Row(f"DiT, best ({best.evaluations})", metric_cells(best.metrics), is_best=True))
    return tuple(rows)


def terminal_table(report: Report) -> str:
    """The table, the verdict and the basis of the numbers: plain text, usually 80 columns wide."""
    rows = comparison_rows(report)
    body = align([HEADER, *((row.method, *row.cells) for row in rows)])
    rule = "-" * max(map(len, body))
    body[-1:] = [rule, body[-1]]
    baselines = 2 + (report.regression is not None)
    body[1 + baselines : 1 + baselines] = [rule]
    body[1:1] = [rule]
    notes = (report.verdict.sentence, basis(report), *meanings(report))
    return "\n".join((*body, "", *(textwrap.fill(note, _WIDTH) for note in notes)))


def basis(report: Report) -> str:
    """What the numbers are computed from, in a few sentences."""
    metrics = report.best.metrics
    samples = count(metrics.samples, "held-out sample")
    if metrics.sources == 1:
        photos = "1 photo, from which no interval follows"
    else:
        photos = (
            f"{count(metrics.sources, 'photo')}; brackets are {metrics.confidence:.0%} bootstrap "
            "intervals over photos"
        )
    if metrics.samples == 1:
        recall = "R@1 and CKA compare samples, and there is one."
    else:
        recall = (
            f"R@1: the true image is the nearest of {metrics.samples} "
            f"(chance {1 / metrics.samples:.3f})."
        )
    return (
        f"{samples} of {photos}. {recall} The best number of evaluations was chosen on these "
        "samples."
    )


def meanings(report: Report) -> list[str]:
    """What the rows are that not every report has."""
    notes = []
    if report.regression is not None:
        notes.append(
            "regression: the same network trained at t = 0 alone, which can translate but not "
            "sample."
        )
    if report.fitted:
        notes.append(
            "fitted (n): the DiT with a solver of n evaluations fitted to it, whose samples are "
            "those of many evaluations."
        )
    return notes


def with_interval(estimate: Estimate, digits: int = 3) -> str:
    """``0.817 [0.811,0.823]``, or the value alone where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    low, high = f"{estimate.low:.{digits}f}", f"{estimate.high:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{low},{high}]"


def metric_cells(metrics: Metrics) -> tuple[str, ...]:
    """The columns of ``HEADER`` after the first."""
    return (
        with_interval(metrics.token_cosine),
        f"{metrics.image_cosine.value:.3f}",
        f"{metrics.centred_cosine.value:.3f}",
        f"{metrics.mse.value:#.3g}".rstrip("."),
        f"{metrics.r2.value:.3f}",
        recall_at_1(metrics),
        or_none(metrics.cka),
    )


def recall_at_1(metrics: Metrics) -> str:
    """R@1, or a word where there is nothing to search among."""
    found = metrics.recall_generated_to_target.get(1)
    return or_none(None if found is None else found.value)


def or_none(value: float | None, digits: int = 3) -> str:
    """A number, or a word where the samples give none."""
    return "none" if value is None else f"{value:.{digits}f}"
