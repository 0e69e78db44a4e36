"""The tables of the HTML page: the comparison, every further number, and the facts of the run."""

from collections.abc import Callable, Sequence
from html import escape

from blip3o_fast.evaluation.bootstrap import Estimate
from blip3o_fast.evaluation.metrics import QUANTILES, RECALL_AT, THRESHOLDS, Metrics
from blip3o_fast.evaluation.report import Report
from blip3o_fast.evaluation.table import HEADER, basis, comparison_rows, metric_cells, with_interval

_QUANTILE_NAMES = (("token_cosine", "Token cosine"), ("image_cosine", "Image cosine"))


def comparison_section(report: Report) -> str:
    """The table that the terminal shows too."""
    rows = [_row(row.method, row.cells, best=row.is_best) for row in comparison_rows(report)]
    return (
        f"<h2>Comparison</h2>\n{_table(HEADER, rows)}\n"
        '<p class="note hint">Scroll the table sideways to see every column.</p>\n'
        f'<p class="note">{escape(basis(report))}</p>'
    )


def details_section(report: Report) -> str:
    """Retrieval both ways, thresholds, quantiles, debiased CKA, CLS, and the whole curve."""
    best = report.best
    methods = (
        (f"DiT, best ({best.evaluations})", best.metrics),
        ("ridge", report.ridge.metrics),
        ("mean predictor", report.mean.metrics),
    )
    header = ("", *(name for name, _ in methods))
    columns = [metrics for _, metrics in methods]
    parts = [_fold("Retrieval, thresholds and CKA", _table(header, _further_rows(columns)))]
    parts.append(_fold("Quantiles over samples", _table(header, _quantile_rows(columns))))
    if best.metrics.cls is not None:
        parts.append(_fold("CLS token", _table(header, _cls_rows(columns))))
    curve = [
        _row(f"DiT, {result.evaluations}", metric_cells(result.metrics)) for result in report.dit
    ]
    parts.append(_fold("Every number of evaluations", _table(HEADER, curve)))
    return "<h2>Details</h2>\n" + "\n".join(parts)


def facts_section(report: Report) -> str:
    """How the numbers came about, as the caller tells it; empty without facts."""
    if not report.facts:
        return ""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items()
    )
    return f'<h2>This run</h2>\n<dl class="facts">{rows}</dl>'


def _further_rows(columns: Sequence[Metrics]) -> list[str]:
    def row(name: str, pick: Callable[[Metrics], Estimate]) -> str:
        return _row(name, [with_interval(pick(metrics)) for metrics in columns])

    rows = [
        row(f"R@{k}, generated to true", lambda m, k=k: m.recall_generated_to_target[k])
        for k in RECALL_AT
    ]
    rows += [
        row(f"R@{k}, true to generated", lambda m, k=k: m.recall_target_to_generated[k])
        for k in RECALL_AT
    ]
    rows += [
        row(f"Image cosine above {t}", lambda m, t=t: m.image_cosine_above[t]) for t in THRESHOLDS
    ]
    rows += [
        row("Image cosine", lambda m: m.image_cosine),
        row("Centred cosine", lambda m: m.centred_cosine),
        row("R2", lambda m: m.r2),
        _row("MSE", [with_interval(metrics.mse, 4) for metrics in columns]),
        _row("CKA", [f"{metrics.cka:.3f}" for metrics in columns]),
        _row("CKA, debiased", [_optional(metrics.cka_debiased) for metrics in columns]),
    ]
    return rows


def _quantile_rows(columns: Sequence[Metrics]) -> list[str]:
    return [
        _row(f"{title}, {level:.0%}", [f"{m.quantiles[name][level]:.3f}" for m in columns])
        for name, title in _QUANTILE_NAMES
        for level in QUANTILES
    ]


def _cls_rows(columns: Sequence[Metrics]) -> list[str]:
    cls = [metrics.cls for metrics in columns if metrics.cls is not None]
    return [
        _row("Cosine", [with_interval(c.cosine) for c in cls]),
        _row("Centred cosine", [with_interval(c.centred_cosine) for c in cls]),
        _row("MSE", [with_interval(c.mse, 4) for c in cls]),
    ]


def _optional(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _table(header: Sequence[str], rows: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Sequence[str], *, best: bool = False) -> str:
    columns = "".join(f"<td>{_value(cell)}</td>" for cell in cells)
    return f'<tr{" class=best" if best else ""}><th scope="row">{_text(name)}</th>{columns}</tr>'


def _value(cell: str) -> str:
    """A number, its interval smaller beside it."""
    number, bracket, ends = cell.partition(" [")
    if not bracket:
        return escape(cell)
    return f"{number} <small>[{ends.replace(',', ', ')}</small>"


def _text(name: str) -> str:
    return escape(name).replace("R2", "R<sup>2</sup>")
