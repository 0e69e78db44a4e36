"""The results under ``benchmarks/results``: every JSON file there, and what wrote it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blip3o_fast.benchmarking.record import KIND, Record, read_record

Kind = Literal[
    "bench",
    "check",
    "profile",
    "long",
    "published",
    "sampling",
    "conventions",
    "fitted",
    "zero_time",
    "fp8",
    "host",
    "demo",
]
KINDS: dict[str, Kind] = {
    KIND: "bench",
    "blip3o-fast gpu check": "check",
    "blip3o-fast profile": "profile",
    "blip3o-fast long training": "long",
    "published_cpu": "published",
    "published_sampling": "sampling",
    "conventions": "conventions",
    "fitted_solvers": "fitted",
    "zero_time": "zero_time",
    "fp8_quality": "fp8",
    "host_cost": "host",
}
"""The name of a kind in a file, under ``kind`` or ``benchmark``."""
FORMAT = 1
NEEDED: dict[Kind, frozenset[str]] = {
    "bench": frozenset(),
    "check": frozenset(("format", "mode", "commit", "environment", "steps")),
    "profile": frozenset(
        ("format", "task", "environment", "seconds", "limit", "launches", "dearest", "rest_seconds")
    ),
    "long": frozenset(("format", "task", "environment", "steps", "skipped", "clipped", "seconds")),
    "published": frozenset(
        ("environment", "seconds", "fastest", "ratio", "difference", "rounds", "layers")
    ),
    "sampling": frozenset(("environment", "seconds", "ratio", "error", "batch", "layers", "fit")),
    "conventions": frozenset(("environment", "data", "steps", "rows")),
    "fitted": frozenset(("environment", "conditions", "samples", "sources", "models")),
    "zero_time": frozenset(("environment", "data", "steps", "sampling", "ridge", "rows")),
    "host": frozenset(("environment", "ops", "warm_call")),
    "demo": frozenset(("title", "verdict", "mean_predictor", "ridge", "dit", "facts")),
    "fp8": frozenset(("environment", "fp8", "parameters", "samples", "sources", "rows")),
}
PARTS = ("environment.json", "smoke.json", "kernels.json", "tests.json")
"""Files that ``gpu_check.sh`` writes beside its summary. They are not results."""


@dataclass(frozen=True)
class Result:
    """One file.

    Attributes:
        path: of the file.
        kind: what wrote it.
        content: the JSON object.
        record: of ``blip3o-fast bench``, None of anything else.
        commit: that was measured, None if nothing says.
        pictures: PNG files that belong to it.
    """

    path: Path
    kind: Kind
    content: dict[str, Any]
    record: Record | None
    commit: str | None
    pictures: tuple[Path, ...]


def read_results(folder: Path) -> list[Result]:
    """All results below a folder, in the order of their paths.

    Raises:
        ValueError: naming a file that is no result, or an incomplete one.
    """
    paths = sorted(path for path in folder.rglob("*.json") if path.name not in PARTS)
    return [read_result(path) for path in paths]


def read_result(path: Path) -> Result:
    """One file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    return as_result(path, content)


def as_result(path: Path, content: Any) -> Result:
    """What a file at ``path`` holds, or will hold."""
    kind = find_kind(path, content)
    missing = sorted(NEEDED[kind] - content.keys())
    if missing:
        raise ValueError(f"{path}: expected the fields of {kind}, {', '.join(missing)} missing")
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {content['format']!r}")
    record = read_record(path) if kind == "bench" else None
    demo = content["facts"]["commit"][:10] if kind == "demo" else None
    commit = demo or find_commit(content)
    return Result(path, kind, content, record, commit, find_pictures(path, kind))


def find_pictures(path: Path, kind: Kind) -> tuple[Path, ...]:
    """The picture of the same name. Of a bench, all pictures that belong to no other file."""
    own = path.with_suffix(".png")
    if kind != "bench":
        return (own,) if own.is_file() else ()
    pictures = sorted(path.parent.glob("*.png"))
    return tuple(x for x in pictures if not x.with_suffix(".json").is_file())


def find_kind(path: Path, content: object) -> Kind:
    """The kind of a file.

    Raises:
        ValueError: if nothing here did.
    """
    if isinstance(content, dict):
        named = content.get("kind", content.get("benchmark"))
        if named in KINDS:
            return KINDS[named]
        if NEEDED["demo"] <= content.keys():
            return "demo"
    raise ValueError(
        f"{path}: expected a result of blip3o-fast bench, gpu_check.sh, profile_launches.py, "
        "long_training.py, published_cpu.py, published_sampling.py, conventions.py, "
        "fitted_solvers.py, zero_time.py, fp8_quality.py or host_cost.py, or a report of "
        "blip3o-fast demo"
    )


def find_commit(content: dict[str, Any]) -> str | None:
    """The commit that was measured, and whether files differed from it."""
    environment = content["environment"] or {}
    commit = environment.get("commit") or content.get("commit")
    return commit and commit[:10] + (" with changes" if environment.get("changed") else "")
