"""``report.html`` of a run: one self-contained page with its curves, costs and events."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from blip3o_fast.training.charts import Curve, Point, line_chart
from blip3o_fast.training.summary import is_clipped

REPORT_NAME = "report.html"
_VALIDATIONS = 20
"""Rows of the table; the curves show all of them."""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1f2430; --faint: #d9dde5;
  --c0: #1d5fd1; --c1: #c2570c; --c2: #18794e; --c3: #8e4ec6; --c4: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --page: #1a1e26; --text: #dfe3ea; --faint: #39404d;
  --c0: #7db0ff; --c1: #ff9f5a; --c2: #5bd39b; --c3: #c79bf2; --c4: #a2abba; } }
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 1180px; padding: 1rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; } h3 { margin: .4rem 0; font-size: 1rem; }
svg { width: 100%; } svg text { fill: var(--text); font-size: 12px; }
svg path { fill: none; stroke-width: 2; stroke-linecap: round; }
svg path.grid { stroke: var(--faint); stroke-width: 1; } svg path.faint { opacity: .3;
  stroke-width: 1; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid var(--faint);
  padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; }
.key { margin-right: .8rem; } .key::before { content: "\\25CF"; margin-right: .3rem; }
""" + "".join(
    f"path.c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }} "
    f".key.c{i}::before {{ color: var(--c{i}); }}\n"
    for i in range(5)
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
        plan: what they were settled to.
    """
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    body = "\n".join(
        (
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(_sentence(summary))}</p>",
            f'<div class="charts">{_curves(steps, validations)}</div>',
            "<h2>Cost and events</h2>",
            _table(_costs(summary, steps)),
            "<h2>Validations</h2>",
            _validation_table(validations),
            "<h2>Plan</h2>",
            _table({k: v for k, v in plan.items() if k != "model"}),
            "<h2>Model</h2>",
            _table(plan["model"]),
            "<h2>Options</h2>",
            _table(options),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
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


def _curves(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]) -> str:
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
            "Seconds a step",
            [
                curve("step", "seconds", 0, noisy=True),
                curve("of that, waiting for data", "data_wait", 1),
            ],
        ),
        line_chart("Learning rate", [curve("rate", "learning_rate", 0)]),
        line_chart("Loss scale", _scale_curves(steps), log=True),
    )
    return "\n".join(chart for chart in charts if chart)


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
        "time": _duration(summary["seconds"]),
        "of that, validating": _duration(summary["validation_seconds"]),
        "median step": f"{summary['step_seconds']:.4g} s",
        "throughput": f"{summary['samples_per_second']:,.4g} samples/s",
        "waiting for data": f"{_duration(summary['data_wait_seconds'])} "
        f"({summary['data_wait_share']:.1%} of the steps' time)",
        "peak memory": "unknown" if memory is None else f"{memory / 2**30:.2f} GiB",
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


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest / 60:.1f} min"


def _validation_table(validations: Sequence[Mapping[str, Any]]) -> str:
    if not validations:
        return "<p>None yet.</p>"
    shown = validations[-_VALIDATIONS:]
    kept = "" if shown == validations else f"The last {_VALIDATIONS} of {len(validations)}. "
    names = ("step", "token_cosine", "image_cosine", "mse", "loss", "above", "samples", "seconds")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f'<td class="number">{_text(v[name])}</td>' for name in names) + "</tr>"
        for v in shown
    )
    return (
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
        f"<p>{kept}above: share of samples with an image cosine over 0.7, 0.8 and 0.9.</p>"
    )


def _table(rows: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th>{escape(name.replace("_", " "))}</th><td class="number">{_text(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f'<div class="scroll"><table>{lines}</table></div>'


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape("none" if value is None else str(value))
