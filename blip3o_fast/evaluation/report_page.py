"""The report as one HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from blip3o_fast.evaluation.bootstrap import Estimate
from blip3o_fast.evaluation.comparison import (
    HEADER,
    basis,
    comparison_rows,
    metric_cells,
    or_none,
    recall_at_1,
    with_interval,
)
from blip3o_fast.evaluation.metrics import QUANTILES, THRESHOLDS, Metrics
from blip3o_fast.evaluation.report import Photo, Report
from blip3o_fast.evaluation.report_plots import (
    encode_image,
    encode_map,
    encode_ramp,
    lowest_colour,
    mean_map,
)
from blip3o_fast.report.page import render

SAMPLES_HEADER = ("error of the solver", "token cosine", "R@1", "variance ratio", "energy distance")

TableRows = list[tuple[str, Sequence[str]]]


def render_page(
    report: Report, light_plots: Mapping[str, bytes], dark_plots: Mapping[str, bytes]
) -> str:
    """The page's HTML.

    Args:
        report: what to show.
        light_plots, dark_plots: PNG contents by file name, as ``draw_plots`` gives them; empty for
            no pictures.
    """
    return render(
        "evaluation.html",
        title=report.title,
        report=report,
        best=report.best,
        verdict_class=_verdict_class(report),
        comparison_header=HEADER,
        comparison_rows=[(row.method, row.cells) for row in comparison_rows(report)],
        basis=basis(report),
        samples_header=("method", *SAMPLES_HEADER),
        samples_rows=_samples_rows(report),
        details=_details(report),
        light_plots=light_plots,
        dark_plots=dark_plots,
        **(_maps(report) if light_plots else {}),
    )


def _verdict_class(report: Report) -> str:
    if not report.verdict.beats_ridge:
        return "loses"
    return "wins" if report.verdict.clear else "close"


def _maps(report: Report) -> dict[str, Any]:
    """The section of maps."""
    lowest = lowest_colour(report)
    return {
        "lowest": lowest,
        "ramp": encode_ramp(),
        "average_map": encode_map(mean_map(report), lowest),
        "photos": [_photo(photo, report, lowest) for photo in report.photos],
    }


def _photo(photo: Photo, report: Report, lowest: float) -> dict[str, Any]:
    scores = report.best.scores
    i = scores.keys.index(photo.key)
    return {
        "key": photo.key,
        "cosine": scores.token_cosine[i],
        "ridge": report.ridge.scores.token_cosine[i],
        "rank": int((scores.token_cosine > scores.token_cosine[i]).sum()) + 1,
        "image": None if photo.image is None else encode_image(photo.image),
        "map": encode_map(photo.cosines, lowest),
    }


def _details(report: Report) -> list[tuple[str, tuple[str, ...], TableRows]]:
    """Titles, headers and rows of the tables behind a click."""
    best = report.best
    methods = {
        f"DiT, best ({best.evaluations})": best.metrics,
        "ridge": report.ridge.metrics,
        "mean predictor": report.mean.metrics,
    }
    if report.regression is not None:
        methods["regression"] = report.regression.metrics
    header, columns = ("", *methods), list(methods.values())
    details = [
        ("Retrieval, thresholds and CKA", header, _further_rows(columns)),
        ("Quantiles over samples", header, _quantile_rows(columns)),
    ]
    if best.metrics.cls is not None:
        details.append(("CLS token", header, _cls_rows(columns)))
    curve: TableRows = [(f"DiT, {r.evaluations}", metric_cells(r.metrics)) for r in report.dit]
    return [*details, ("Every number of evaluations", HEADER, curve)]


def _samples_rows(report: Report) -> TableRows:
    """Samples by the usual solver and by fitted ones; nothing where no solver was fitted."""
    if not report.fitted:
        return []
    curves = [("DiT", result) for result in report.dit]
    curves += [("fitted", result) for result in report.fitted]
    rows: TableRows = []
    for name, result in curves:
        metrics, error = result.metrics, result.solver_error
        rows.append(
            (
                f"{name}, {result.evaluations}",
                (
                    "" if error is None else f"{error:.2g}",
                    with_interval(metrics.token_cosine),
                    recall_at_1(metrics),
                    f"{metrics.variance_ratio.value:.3f}",
                    or_none(metrics.energy_distance, 4),
                ),
            )
        )
    return rows


def _further_rows(columns: Sequence[Metrics]) -> TableRows:
    def row(name: str, estimates: Sequence[Estimate], digits: int = 3) -> tuple[str, list[str]]:
        return name, [with_interval(estimate, digits) for estimate in estimates]

    return [
        *(
            row(f"R@{k}, generated to true", [m.recall_generated_to_target[k] for m in columns])
            for k in columns[0].recall_generated_to_target
        ),
        *(
            row(f"R@{k}, true to generated", [m.recall_target_to_generated[k] for m in columns])
            for k in columns[0].recall_target_to_generated
        ),
        *(
            row(f"Image cosine above {t}", [m.image_cosine_above[t] for m in columns])
            for t in THRESHOLDS
        ),
        row("Image cosine", [m.image_cosine for m in columns]),
        row("Centred cosine", [m.centred_cosine for m in columns]),
        row("R2", [m.r2 for m in columns]),
        row("MSE", [m.mse for m in columns], 4),
        row("Variance ratio", [m.variance_ratio for m in columns]),
        ("Energy distance", [or_none(m.energy_distance, 4) for m in columns]),
        ("CKA", [or_none(m.cka) for m in columns]),
        ("CKA, debiased", [or_none(m.cka_debiased) for m in columns]),
    ]


def _quantile_rows(columns: Sequence[Metrics]) -> TableRows:
    return [
        (f"{title}, {level:.0%}", [f"{m.quantiles[name][level]:.3f}" for m in columns])
        for name, title in (("token_cosine", "Token cosine"), ("image_cosine", "Image cosine"))
        for level in QUANTILES
    ]


def _cls_rows(columns: Sequence[Metrics]) -> TableRows:
    cls = [metrics.cls for metrics in columns if metrics.cls is not None]
    return [
        ("Cosine", [with_interval(c.cosine) for c in cls]),
        ("Centred cosine", [with_interval(c.centred_cosine) for c in cls]),
        ("MSE", [with_interval(c.mse, 4) for c in cls]),
    ]
