"""``report.html`` of a run: one self-contained page with its curves, costs and events."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from blip3o_fast.quantities import duration, size
from blip3o_fast.report.charts import Curve, Point, line_chart
from blip3o_fast.report.page import render, value_text
from blip3o_fast.training.summary import is_clipped

REPORT_NAME = "report.html"
_VALIDATIONS = 20
"""Rows of the table; the curves show all of them."""
_VALIDATION_FIELDS = (
    *("step", "token_cosine", "image_cosine", "mse"),
    *("loss", "above", "samples", "seconds"),
)


def render_page(
    title: str,
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    options: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        title: heading.
        records: of ``metrics.jsonl``.
        summary: of ``summarise``, with ``best``.
        options: as given, JSON-ready.
        plan: what the options were resolved to.
    """
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    shown = validations[-_VALIDATIONS:]
    return render(
        "training.html",
        title=title,
        sentence=_sentence(summary),
        charts=_charts(steps, validations),
        costs=_costs(summary, steps),
        validations=len(validations),
        validation_header=[name.replace("_", " ") for name in _VALIDATION_FIELDS],
        validation_rows=[
            (value_text(v["step"]), [value_text(v[name]) for name in _VALIDATION_FIELDS[1:]])
            for v in shown
        ],
        plan={name: value for name, value in plan.items() if name != "model"},
        model=plan["model"],
        options=options,
    )


def _sentence(summary: Mapping[str, Any]) -> str:
    done = f"{summary['steps']:,} of {summary['total_steps']:,} steps"
    best = summary["best"]
    if best is None:
        return f"{done}; not validated yet."
    return (
        f"{done}. Best on held-out samples after step {best['step']:,}: token cosine "
        f"{best['token_cosine']:.4f}, image cosine {best['image_cosine']:.4f}."
    )


def _charts(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> list[Markup]:
    def curve(name: str, field: str, colour: int, **style: bool) -> Curve:
        return Curve(name, _points(steps, field), colour, **style)

    terms = ("velocity", "semantic", "cosine", "consistency")
    losses = [curve(term, f"{term}_loss", i, noisy=True) for i, term in enumerate(terms)]
    clipped = [record for record in steps if is_clipped(record)]
    charts = (
        line_chart(
            "Loss",
            [
                curve("training, and its moving median", "loss", 0, noisy=True),
                Curve("held out", _points(validations, "loss"), 1),
            ],
            note="The floor is not zero: noise and image cannot both be known.",
        ),
        line_chart(
            "Similarity of generated to true tokens, held out",
            [
                Curve("token cosine", _points(validations, "token_cosine"), 0),
                Curve("image cosine", _points(validations, "image_cosine"), 1),
            ],
        ),
        line_chart("Terms of the loss", losses),
        line_chart(
            "Gradient norm before clipping",
            [
                curve("norm", "grad_norm", 0, noisy=True),
                curve("bound", "clip_bound", 4),
                Curve("clipped", _points(clipped, "grad_norm"), 1, marks=True),
            ],
            log=True,
        ),
        line_chart(
            "Seconds per step",
            [
                curve("step", "seconds", 0, noisy=True),
                curve("of that, waiting for data", "data_wait", 1),
            ],
        ),
        line_chart("Learning rate", [curve("rate", "learning_rate", 0)]),
        line_chart("Loss scale", _scale_curves(steps), log=True),
    )
    return [chart for chart in charts if chart]


def _scale_curves(steps: Sequence[Mapping[str, Any]]) -> list[Curve]:
    scaled = any(record["loss_scale"] != 1 for record in steps)
    return [Curve("scale", _points(steps, "loss_scale"), 0)] if scaled else []


def _points(records: Sequence[Mapping[str, Any]], field: str) -> list[Point]:
    return [(r["step"], r[field]) for r in records if r[field] is not None]


def _costs(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    memory = summary["peak_memory_bytes"]
    count = max(len(steps), 1)

    def share(name: str) -> str:
        return f"{summary[name]:,} ({summary[name] / count:.1%})"

    return {
        "time": duration(summary["seconds"]),
        "of that, validating": duration(summary["validation_seconds"]),
        "median step": f"{summary['step_seconds']:.4g} s",
        "throughput": f"{summary['samples_per_second']:,.4g} samples/s",
        "waiting for data": f"{duration(summary['data_wait_seconds'])} "
        f"({summary['data_wait_share']:.1%} of the steps' time)",
        "peak memory": "unknown" if memory is None else size(memory),
        "clipped steps": share("clipped_steps"),
        "steps under the halved bound": share("tightened_steps"),
        "skipped steps": share("skipped_steps")
        + _listed([r["step"] for r in steps if r["skipped"]]),
    }


def _listed(numbers: Sequence[int], most: int = 20) -> str:
    if not numbers:
        return ""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f": {', '.join(f'{n:,}' for n in numbers[:most])}{more}"
