"""A record as text for a terminal."""

from collections.abc import Sequence
from itertools import compress

from blip3o_fast.benchmarking.compare import Comparison
from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.report.columns import align

BEYOND = 1.05
"""Share of a limit above which noise does not explain it."""
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def render_record(record: Record) -> str:
    """Device, ceilings, a table for each group, and what is absent, left out or failed."""
    environment = record.environment
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in record.rates.items())
    lines = [
        f"{environment['device']}; load {environment['load'][0]}",
        f"measured ceilings: {record.bandwidth / 1e9:.3g} GB/s copy, {rates}, "
        f"{record.transfer / 1e9:.3g} GB/s from the host",
    ]
    for group in dict.fromkeys(m.group for m in record.measurements):
        rows = [m for m in record.measurements if m.group == group]
        lines += ["", *render_group(group, rows)]
        if group == "ops" and record.predictions:
            lines.append(record.predictions)
    absent = {name: state for name, state in record.peers.items() if state.startswith("absent")}
    present = [f"{name} {state}" for name, state in record.peers.items() if name not in absent]
    lines += ["", f"peers present: {', '.join(present) or 'none'}"]
    lines += [f"{name}: {state}" for name, state in absent.items()]
    lines += [f"left out, {name}: {reason}" for name, reason in record.left_out.items()]
    lines += [f"FAILED, {name}: {reason}" for name, reason in record.failures.items()]
    return "\n".join(lines)


def render_group(group: str, rows: Sequence[Measurement]) -> list[str]:
    """Times beside their limit. The contenders of a task are together.

    Where there is a ``warm`` time, on the same tensors in every call, the other times are cold.
    Beside a prediction of the share of the limit stands how far the measured share is from it.
    """
    head = ("", "contender", "time", "+-", "limit", "of limit", "predicted", "off")
    head += ("bound by", "warm", "host")
    cells: list[Sequence[str]] = []
    previous = ""
    for m in rows:
        title = f"{m.name}, {m.shape}, {m.dtype}"
        spread = (m.high - m.low) / 2 / m.median
        row = (
            "" if title == previous else title,
            m.contender + ("" if m.queued is not False else " (host-bound)"),
            seconds(m.median),
            f"{spread:.0%}",
            seconds(m.limit),
            f"{m.fraction:.0%}" + ("!" if m.fraction > BEYOND else ""),
            "" if m.predicted is None else f"{m.predicted:.0%}",
            "" if m.predicted is None else f"{m.fraction / m.predicted - 1:+.0%}",
            m.bound,
            "" if m.warm is None else seconds(m.warm),
            "" if m.host is None else seconds(m.host),
        )
        cells.append(row)
        previous = title
    filled = [any(column) for column in zip(*cells, strict=True)]
    lines = [group, *align([list(compress(row, filled)) for row in (head, *cells)])]
    if any(m.fraction > BEYOND for m in rows):
        lines.append("! faster than the limit, whose ceiling was measured too low: run it again")
    return lines


def render_comparison(comparison: Comparison) -> str:
    """Every change beyond noise, and a verdict."""
    lines = ["", "against the earlier run (noise band: the larger of the device's least band and "]
    lines[-1] += "twice the spread of either run)"
    lines += [f"warning: {text}" for text in comparison.warnings]
    moved = [change for change in comparison.changes if change.verdict != "same"]
    rows: list[Sequence[str]] = [
        (
            ", ".join(change.new.key),
            seconds(change.old.median),
            seconds(change.new.median),
            f"{change.ratio - 1:+.0%}",
            f"band {change.band:.0%}",
            "REGRESSION" if change.is_regression else change.verdict,
        )
        for change in moved
    ]
    lines += align(rows)
    lines += [f"only in this run: {name}" for name in comparison.added]
    lines += [f"only in the earlier run: {name}" for name in comparison.gone]
    same = len(comparison.changes) - len(moved)
    lines.append(
        f"{same} of {len(comparison.changes)} figures unchanged within noise; "
        f"{len(comparison.regressions)} regressions; "
        f"{len(comparison.added)} new, {len(comparison.gone)} gone"
    )
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Three digits and a unit: ``1.23 ms``."""
    for unit, name in UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value * 1e6:.2g} us"
