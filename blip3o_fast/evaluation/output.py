"""The files that a report becomes.

Everything is rendered in memory before any file is written, so an error while rendering leaves the
folder as it was:

    report.html       one self-contained page
    report.json       every number, ``format_version`` first
    samples.csv       one row per sample, one column per method and value
    *.png             the pictures of ``report_plots``
"""

import csv
import io
import json
from pathlib import Path

from blip3o_fast.atomic import write_atomically
from blip3o_fast.evaluation.report import Report
from blip3o_fast.evaluation.report_page import render_page
from blip3o_fast.evaluation.report_plots import draw_plots
from blip3o_fast.report.style import DARK, LIGHT
from blip3o_fast.untrusted import cell

_SAMPLE_VALUES = ("token_cosine", "image_cosine", "centred_cosine", "mse")


def write_report(report: Report, folder: str | Path, *, plots: bool = True) -> Path:
    """Write the report's files into ``folder``, made if need be, and return the page's path.

    Args:
        plots: draw the pictures; needs matplotlib. Off writes no PNG, and a page that says so.

    Raises:
        ImportError: if ``plots`` and matplotlib is not installed; nothing is written.
    """
    light = draw_plots(report, LIGHT) if plots else {}
    dark = draw_plots(report, DARK) if plots else {}
    files = {
        "report.json": json.dumps(report.to_dict(), indent=1, allow_nan=False).encode() + b"\n",
        "samples.csv": _samples_csv(report).encode(),
        **light,
        "report.html": render_page(report, light, dark).encode(errors="backslashreplace"),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / "report.html"


def _samples_csv(report: Report) -> str:
    columns = {
        f"{method}_{value}": getattr(result.scores, value)
        for method, result in report.methods
        for value in _SAMPLE_VALUES
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["key", "source", *columns])
    scores = report.mean.scores
    for i, (key, source) in enumerate(zip(scores.keys, scores.sources, strict=True)):
        writer.writerow(
            [cell(key), cell(source), *(f"{values[i]:.6g}" for values in columns.values())]
        )
    return out.getvalue()
