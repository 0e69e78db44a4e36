"""Results as Markdown: each figure beside its limit and its peers, under where it was measured."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from os.path import relpath
from pathlib import Path
from typing import Any

import fp8_quality
from read_results import Kind, Result, as_result
from tables import number, table

from blip3o_fast.atomic import json_text
from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.quantities import count, duration, three_digits

HEADLINES = ("evaluation", "generate", "training")
"""Groups of ``blip3o-fast bench`` that a reader asks for first."""


def show(content: dict[str, Any]) -> str:
    """A result for a terminal, by the program that has just measured it."""
    result = as_result(Path("this result"), json.loads(json_text(content)))  # as a file holds it
    return "\n\n".join(SECTIONS[result.kind](result))


def section(result: Result, folder: Path) -> str:
    """All of one result; links are relative to ``folder``."""
    name = result.path.relative_to(folder).as_posix()
    parts = [f"### {name}", where(result), *SECTIONS[result.kind](result)]
    if result.pictures:
        parts.append(pictures(result, folder))
    return "\n\n".join(parts)


def pictures(result: Result, folder: Path) -> str:
    """The pictures of a result, by paths relative to ``folder``."""
    places = [Path(relpath(path, folder)).as_posix() for path in result.pictures]
    return "\n".join(f"![{Path(place).stem}]({place})" for place in places)


def headline(result: Result, folder: Path) -> str:
    """The shortest account of one result; empty if it has none. Pictures as in ``section``."""
    if result.record is not None and result.record.environment["device_type"] == "cuda":
        rows = [m for m in result.record.measurements if m.group in HEADLINES]
        return f"{where(result)}\n\n{against_peers(rows)}" if rows else ""
    if result.kind == "fitted":
        return f"{where(result)}\n\n" + "\n\n".join(
            errors_of_solvers(model) for model in result.content["models"]
        )
    if result.kind in ("sampling", "conventions", "zero_time"):
        return "\n\n".join(
            (where(result), *SECTIONS[result.kind](result), pictures(result, folder))
        ).rstrip()
    return ""


def where(result: Result) -> str:
    """Device, versions, commit and date in one sentence."""
    if result.kind == "demo":
        facts = result.content["facts"]
        return f"**{facts['device']}**; {facts['versions']}; commit {result.commit}."
    facts = result.content["environment"]
    if facts is None:
        return "The environment is not recorded."
    parts = [f"**{facts['device']}**"]
    if facts["driver"]:
        parts.append(f"driver {facts['driver']}, CUDA {facts['cuda']}")
    parts.append(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    parts.append(f"commit {result.commit}" if result.commit else "commit not recorded")
    parts += [facts["date"][:10], f"load {facts['load'][0]:.1f}"]
    return "; ".join(parts) + "."


def bench(result: Result) -> Iterator[str]:
    """A run of ``blip3o-fast bench``."""
    record = result.record
    assert record is not None
    yield ceilings(record)
    yield against_peers(record.measurements)
    groups = groupby(record.measurements, key=lambda m: m.group)
    parts = [f"**{name}**\n\n{contenders(list(rows))}" for name, rows in groups]
    parts += [record.predictions] if record.predictions else []
    yield details("Every contender", "\n\n".join(parts))
    absent = [f"{name}: {state}" for name, state in record.peers.items() if "absent" in state]
    left = [f"{name}: {reason}" for name, reason in record.left_out.items()]
    failed = [f"{name}: {reason}" for name, reason in record.failures.items()]
    if failed:
        yield "Failed:\n\n" + "\n".join(f"* {line}" for line in failed)
    if absent or left:
        yield details("Left out", "\n".join(f"* {line}" for line in (*absent, *left)))


def ceilings(record: Record) -> str:
    """The rates behind the limits."""
    rates = [f"{number(rate, 'FLOP/s')} {dtype}" for dtype, rate in record.rates.items()]
    quick = " A quick run: few samples." if record.settings.get("quick") else ""
    measured = ", ".join((f"{number(record.bandwidth, 'B/s')} copy", *rates))
    return f"Limits are work over what this run measured: {measured}.{quick}"


def against_peers(rows: Sequence[Measurement]) -> str:
    """The fastest of ours at each task, its limit, and the fastest of the others."""
    lines: list[Sequence[str]] = []
    for task, group in groupby(rows, key=lambda m: m.key[:-1]):
        together = list(group)
        ours = [m for m in together if m.ours]
        if not ours:
            continue
        best = min(ours, key=lambda m: m.median)
        others = [m for m in together if not m.ours]
        peer, ratio = "none in this run", ""
        if others:
            other = min(others, key=lambda m: m.median)
            peer = f"{other.contender}, {duration(other.median)}"
            ratio = f"{three_digits(other.median / best.median)}x"
        limit = (duration(best.limit), f"{best.fraction:.0%}", best.bound)
        lines.append((title(task), best.contender, duration(best.median), *limit, peer, ratio))
    head = ("what", "ours", "time", "limit", "of limit", "bound by", "fastest peer", "peer / ours")
    return table(head, lines)


def contenders(rows: Sequence[Measurement]) -> str:
    """Every contender of a group; with the share of the limit that was predicted, if any was."""
    head = ("what", "contender", "time", "+-", "limit", "of limit", "bound by")
    predicted = any(m.predicted is not None for m in rows)
    return table(
        (*head, "predicted") if predicted else head,
        [
            (
                title(m.key[:-1]),
                m.contender + (" (host-bound)" if m.queued is False else ""),
                duration(m.median),
                f"{(m.high - m.low) / 2 / m.median:.0%}",
                duration(m.limit),
                f"{m.fraction:.0%}",
                m.bound,
                *(("" if m.predicted is None else f"{m.predicted:.0%}",) if predicted else ()),
            )
            for m in rows
        ],
    )


def title(task: Sequence[str]) -> str:
    """``evaluation, base-b64, bf16``."""
    _, name, shape, dtype = task
    return f"{name}, {shape}, {dtype}"


def published(result: Result) -> Iterator[str]:
    """Beside the published implementation on a CPU."""
    content = result.content
    rows = [
        (
            name,
            duration(value),
            duration(content["fastest"][name]),
            f"{three_digits(content['ratio'][name])}x",
            duration(limit),
            f"{limit / value:.0%}",
        )
        for name, value in content["seconds"].items()
        if not name.startswith("GEMM limit")
        for limit in (content["seconds"][f"GEMM limit, {name.rpartition(', ')[2]}"],)
    ]
    head = ("one evaluation, batch 1", "median", "fastest", "published / it")
    head += ("GEMMs alone", "of that limit")
    yield table(head, rows)
    yield (
        f"Base with {content['layers']} blocks, {content['rounds']} turns each; ratio and limit "
        "are of medians. The two implementations differ by "
        f"{content['difference']:.1e} (relative, fp32)."
    )


def sampling(result: Result) -> Iterator[str]:
    """A batch, beside the published implementation on a CPU."""
    content = result.content
    yield table(
        ("a batch translated", "time", "published / it", "error"),
        [
            (name, duration(value), f"{three_digits(content['ratio'][name])}x", f"{error:.1e}")
            for name, value in content["seconds"].items()
            for error in (content["error"][name],)
        ],
    )
    fit = content["fit"]
    yield (
        f"Base with {content['layers']} blocks and random weights, {content['batch']} samples, "
        f"medians of {count(content['rounds'], 'turn')}; errors are relative, of the final state, "
        f"to the first line. Fitting the solver to {fit['conditions']} conditions took "
        f"{duration(fit['seconds'])} and {number(fit['bytes'], 'B')} more memory."
    )


def fitted(result: Result) -> Iterator[str]:
    """Fitted solvers, by error and by what their samples are worth."""
    content = result.content
    yield (
        f"Fitted on {content['conditions']} training crops, measured on {content['samples']} "
        f"held-out crops of {content['sources']} photos."
    )
    for model in content["models"]:
        yield errors_of_solvers(model)
        yield details("Samples, dtypes, transfer", "\n\n".join(further(model)))


def errors_of_solvers(model: dict[str, Any]) -> str:
    """Relative errors of the final state, by solver and evaluations."""
    by_count: dict[int, dict[str, float]] = {}
    for row in model["errors"]:
        by_count.setdefault(row["evaluations"], {})[row["solver"]] = row["error"]
    names = list(dict.fromkeys(row["solver"] for row in model["errors"]))
    rows = [
        (str(count), *(f"{found[name]:.2g}" if name in found else "" for name in names))
        for count, found in sorted(by_count.items())
    ]
    guided = "" if model["guidance_scale"] == 1 else f", guidance {model['guidance_scale']:g}"
    if model.get("time_grid"):
        guided += f", times of {model['time_grid']}"
    head = (
        f"**{model['conventions'].capitalize()} conventions{guided}.** Relative error of the final "
        f"state; the reference has {model['reference']}."
    )
    return f"{head}\n\n{table(('evaluations', *names), rows)}"


def further(model: dict[str, Any]) -> Iterator[str]:
    """What the samples are worth, what dtypes add, and where the fit does not transfer."""
    columns = ("token_cosine", "recall_at_1", "variance_ratio", "energy_distance")
    yield table(
        ("samples of", "token cosine", "R@1", "variance ratio", "energy distance"),
        [
            (
                f"{row['solver']}{', ' + str(row['evaluations']) if row['evaluations'] else ''}",
                *(f"{row[name]:.4f}" for name in columns),
            )
            for row in model["samples"]
        ],
    )
    yield (
        "Token cosine and R@1 are to the true tokens; variance ratio and energy distance to "
        "samples of the reference from other noise, for which the first row is the floor."
    )
    names = ("fp32", "bf16", "fp8")
    yield table(
        ("evaluations in", *names),
        [
            (str(row["evaluations"]), *(f"{row[name]:.2g}" for name in names))
            for row in model["dtypes"]
        ],
    )
    counts = [row["evaluations"] for row in model["dtypes"]]
    yield table(
        ("where it was not fitted", *map(str, counts)),
        [
            (row["case"], *(f"{row['errors'][str(count)]:.2g}" for count in counts))
            for row in model["transfer"]
        ],
    )


def zero_time(result: Result) -> Iterator[str]:
    """What training at t = 0 buys and costs."""
    content = result.content
    seeds = len({row["seed"] for row in content["rows"]})
    yield f"{content['data']}; {content['steps']} steps each, {seeds} seeds: mean (range)."
    columns = ("token_cosine", "recall_at_1", "variance_ratio", "energy_distance")
    kinds = groupby(
        sorted(content["rows"], key=lambda row: row["fraction"]), key=lambda row: row["fraction"]
    )
    rows: list[Sequence[str]] = [
        ("ridge regression", f"{content['ridge']['token_cosine']:.4f}", *[""] * len(columns))
    ]
    for fraction, group in kinds:
        runs = list(group)
        cells = [spread([run["one"]["token_cosine"] for run in runs])]
        cells += [spread([run["many"][name] for run in runs]) for name in columns]
        rows.append((f"{fraction:g}", *cells))
    many = f"{content['sampling']} evaluations"
    head = [f"{many}: {name.replace('_', ' ').replace('recall at 1', 'R@1')}" for name in columns]
    yield table(("share at t = 0", "1 evaluation: token cosine", *head), rows)


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def conventions(result: Result) -> Iterator[str]:
    """The same data, steps and sizes under both conventions."""
    content = result.content
    yield f"{content['data']}; {content['steps']} steps each. Token cosine, 95% interval."
    counts = sorted({row["evaluations"] for row in content["rows"] if row["evaluations"]})
    kinds = groupby(content["rows"], key=lambda r: (r["network"], r["loss"], r["sampler"]))
    rows: list[Sequence[str]] = []
    for kind, group in kinds:
        by_count = {row["evaluations"]: cosine(row) for row in group}
        # A baseline evaluates no network; its figure stands once.
        cells = [by_count.get(n, by_count.get(0, "") if n == counts[0] else "") for n in counts]
        rows.append((*kind, *cells))
    head = [f"{n} evaluation{'s' * (n > 1)}" for n in counts]
    yield table(("network", "loss", "sampler", *head), rows)


def cosine(row: dict[str, Any]) -> str:
    """A token cosine with its interval."""
    low, high = row["token_cosine_interval"]
    return f"{row['token_cosine']:.3f} [{low:.3f}, {high:.3f}]"


def check(result: Result) -> Iterator[str]:
    """What ``gpu_check.sh`` ran."""
    rows = [
        (
            step["name"],
            step["verdict"],
            f"{step['seconds']:.0f} s",
            step["reason"].replace("|", "/"),
        )
        for step in result.content["steps"]
    ]
    if result.content["mode"] == "cpu":
        yield "Without a GPU: a test of the script."
    yield table(("step", "verdict", "took", "reason"), rows)


def profile(result: Result) -> Iterator[str]:
    """The dearest launches of one evaluation or training step."""
    content = result.content
    task, total = content["task"], content["seconds"]
    yield (
        f"{task['name'].capitalize()} of {task['shape']} in {task['dtype']}: {duration(total)} in "
        f"{content['launches']:g} launches, limit {duration(content['limit'])}."
    )
    rows: list[Sequence[str]] = []
    for launch in content["dearest"]:
        limit = launch["limit"]
        beside = (
            ("", "") if limit is None else (duration(limit), f"{limit / launch['seconds']:.0%}")
        )
        shapes = " ".join("x".join(map(str, shape)) for shape in launch["shapes"][:3])
        times = (f"{launch['calls']:g}", duration(launch["seconds"]), f"{launch['share']:.0%}")
        rows.append((f"`{launch['op']}`", shapes, *times, *beside))
    rest = content["rest_seconds"]
    rows.append(("all others", "", "", duration(rest), f"{rest / total:.0%}", "", ""))
    yield table(("operator", "inputs", "calls", "time", "of all", "limit", "of limit"), rows)


def long(result: Result) -> Iterator[str]:
    """Many training steps in a row."""
    content = result.content
    task, peak = content["task"], content["peak"]
    eva, clip = task["scales"]
    yield (
        f"{content['steps']:,} training steps of {task['shape']} in {task['dtype']} on random "
        f"embeddings of standard deviations {eva:g} (EVA) and {clip:g} (CLIP): "
        f"{content['skipped']:,} with NaN or Inf, {content['clipped']:,} clipped, "
        f"{duration(content['seconds'])} a step of which {duration(content['data_wait'])} waiting "
        "for data" + ("." if peak is None else f", {number(peak, 'B')} allocated at most.")
    )


def fp8(result: Result) -> Iterator[str]:
    """The accuracy of each dtype."""
    content = result.content
    yield (
        f"{content['parameters']:,} parameters; {content['samples']} held-out samples of "
        f"{content['sources']} photos; FP8 by {content['fp8']}."
    )
    yield fp8_quality.table(content["rows"])


def demo(result: Result) -> Iterator[str]:
    """The comparison of ``blip3o-fast demo``."""
    content = result.content
    rows = [
        ("mean predictor", content["mean_predictor"]),
        ("tuned ridge regression", content["ridge"]),
    ]
    if content.get("regression"):
        rows.append(("the same network as a regression", content["regression"]))
    for found in content["dit"]:
        count = found["evaluations"]
        rows.append((f"DiT, {count} evaluation{'s' * (count > 1)}", found))
    for found in content.get("fitted", ()):
        rows.append((f"DiT, fitted solver, {found['evaluations']} evaluations", found))
    samples = content["ridge"]["samples"]
    head = ("method", "token cosine, 95% interval", "image cosine", "R2", f"R@1 of {samples}")
    yield table(
        head,
        [
            (
                name,
                "{value:.3f} [{low:.3f}, {high:.3f}]".format(**found["token_cosine"]),
                f"{found['image_cosine']['value']:.3f}",
                f"{found['r2']['value']:.3f}",
                f"{found['recall_generated_to_target']['1']['value']:.3f}",
            )
            for name, found in rows
        ],
    )
    facts = content["facts"]
    yield f"{content['verdict']['sentence']} Crops: {facts['crops']}; model: {facts['model']}."


def host(result: Result) -> Iterator[str]:
    """What the host pays for a call of each op, beside torch's own."""
    content = result.content
    names = ("forward", "torch_forward", "both", "torch_both")
    yield table(
        ("op", "forward", "rms_norm of torch", "forward and backward", "rms_norm of torch"),
        [(row["op"], *(microseconds(row[name]) for name in names)) for row in content["ops"]],
    )
    warm = content["warm_call"]
    yield (
        f"`generate` on a warm plan, without its evaluations: {microseconds(warm['generate'])}, "
        f"of which {microseconds(warm['find_engine'])} look whether weights have changed."
    )


def microseconds(value: float | None) -> str:
    """A time of the host, empty if there is none."""
    return "" if value is None else f"{value:.0f} us"


def details(summary: str, text: str) -> str:
    """Text behind a line to click on."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


SECTIONS: dict[Kind, Callable[[Result], Iterator[str]]] = {
    "bench": bench,
    "check": check,
    "profile": profile,
    "long": long,
    "published": published,
    "sampling": sampling,
    "conventions": conventions,
    "fitted": fitted,
    "zero_time": zero_time,
    "fp8": fp8,
    "host": host,
    "demo": demo,
}
