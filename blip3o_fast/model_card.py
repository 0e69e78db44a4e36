"""The model card: ``README.md`` beside a model, for people who find it without its story.

What is not known stands as "not recorded". Nothing is guessed.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_fast.atomic import write_atomically
from blip3o_fast.checked import read_json
from blip3o_fast.config import DiTConfig
from blip3o_fast.data import Encoder, Manifest
from blip3o_fast.flow import FittedSolver
from blip3o_fast.untrusted import one_line, reading

CARD_NAME = "README.md"
_MARK = "<!-- This card was written by blip3o_fast. Without this line it is never overwritten. -->"
_FRONT = """---
library_name: blip3o_fast
tags:
- blip3o
- rectified-flow
- image-feature-translation
---
"""
_USE = """```python
from blip3o_fast import load_trained_model

model = load_trained_model("FOLDER")  # or "hf:owner/name"
clip = model.generate(eva, num_inference_steps=1, use_heun=False)  # {eva} -> {clip}
```"""
_UNKNOWN = "not recorded"
_SOLVERS = "## Fitted solvers"


def make_card(
    config: DiTConfig,
    parameters: int,
    solvers: Mapping[int, FittedSolver],
    *,
    shards: str | Path | None = None,
    report: str | Path | None = None,
) -> str:
    """The text of a card.

    Args:
        config: of the model.
        parameters: how many it has.
        solvers: fitted to it, by number of evaluations.
        shards: folder of the embeddings that it was trained on, whose manifest names the encoders.
        report: ``report.json`` of an evaluation.

    Raises:
        FileNotFoundError: if there is no manifest, or no report.
        ValueError: if one of them is not what its name says.
    """
    manifest = None if shards is None else Manifest.load(shards)
    results = None if report is None else _read_results(Path(report))
    parts = [
        f"{_FRONT}\n{_MARK}\n\n# EVA-CLIP tokens to CLIP tokens",
        "A diffusion transformer (BLIP3-o DiT) that translates the patch tokens of one image "
        "encoder into those of another by rectified flow. It needs the library `blip3o_fast`.",
        _USE.format(
            eva=f"[B, {config.num_tokens}, {config.eva_embedding_size}]",
            clip=f"[B, {config.num_tokens}, {config.clip_embedding_size}]",
        ),
        "## The model",
        _table(("fact", "value"), _facts(config, parameters, manifest)),
        "## Results",
        _results(results),
        _SOLVERS,
        _solvers(solvers),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder: str | Path, card: str) -> None:
    """Write the card beside a model, unless somebody else's is there."""
    path = Path(folder) / CARD_NAME
    if not path.is_file() or _MARK in path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, card.encode())


def refresh_solvers(folder: str | Path, solvers: Mapping[int, FittedSolver]) -> None:
    """List these solvers in the card of a folder, if there is one that ``write_card`` wrote.

    The rest of it stays: what it says of data and results is not known here.
    """
    path = Path(folder) / CARD_NAME
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    before, heading, _ = card.rpartition(f"{_SOLVERS}\n")  # the last section
    if _MARK in before:
        write_card(folder, f"{before}{heading}\n{_solvers(solvers)}\n")


def _facts(
    config: DiTConfig, parameters: int, manifest: Manifest | None
) -> Iterable[tuple[str, str]]:
    """Rows about the model and its data."""
    yield "conventions", f"{config.conventions}: time, signs and positions, see `config.json`"
    yield "parameters", f"{parameters:,}"
    yield "width, blocks", f"{config.hidden_size}, {config.num_hidden_layers}"
    cls = "with a CLS token first" if config.has_cls else "patches only"
    yield "tokens", f"{config.num_tokens}, {cls}"
    yield "targets multiplied by", f"{config.simple_scale_factor:g}; `generate` divides by it"
    dropped = config.condition_dropout
    yield "guidance", f"condition dropped with probability {dropped:g}" if dropped else "none"
    yield "source encoder", _encoder(manifest and manifest.eva_encoder)
    yield "target encoder", _encoder(manifest and manifest.clip_encoder)
    if manifest is None:
        yield "data", _UNKNOWN
    else:
        split = manifest.split
        held = "some photos" if split.heldout_sources else f"{split.heldout_fraction:.0%} of photos"
        yield "data", f"{manifest.samples:,} samples, {held} held out"


def _encoder(encoder: Encoder | None) -> str:
    if encoder is None:
        return _UNKNOWN
    return ", ".join(filter(None, (encoder.name, encoder.revision, encoder.layer)))


def _read_results(path: Path) -> list[tuple[str, ...]]:
    """Rows of a ``report.json``: method, token cosine, image cosine, R2, R@1."""
    with reading(path, "the report.json of an evaluation"):
        content = read_json(path)
        methods = [("mean predictor", content["mean_predictor"]), ("ridge", content["ridge"])]
        methods += [(_counted(m), m) for m in content["dit"]]
        methods += [(f"{_counted(m)}, fitted", m) for m in content["fitted"]]
        return [(name, *_measured(metrics)) for name, metrics in methods]


def _counted(metrics: Mapping[str, Any]) -> str:
    count = int(metrics["evaluations"])
    return f"{count} evaluation{'' if count == 1 else 's'}"


def _measured(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    cosine = metrics["token_cosine"]
    values = [metrics["image_cosine"], metrics["r2"], metrics["recall_generated_to_target"]["1"]]
    interval = f"{cosine['value']:.3f} [{cosine['low']:.3f}, {cosine['high']:.3f}]"
    return (interval, *(f"{value['value']:.3f}" for value in values), str(int(metrics["samples"])))


def _results(rows: Sequence[tuple[str, ...]] | None) -> str:
    if rows is None:
        return f"{_UNKNOWN.capitalize()}: `blip3o-fast evaluate` measures a model beside baselines."
    header = ("method", "token cosine, interval", "image cosine", "R2", "R@1", "samples")
    return _table(header, rows) + (
        "\n\nThe mean predictor ignores its input; ridge is a tuned linear map. One evaluation "
        "gives the mean of all embeddings that fit; more of them give a sample."
    )


def _solvers(solvers: Mapping[int, FittedSolver]) -> str:
    if not solvers:
        return "None. `blip3o-fast fit-solver` fits some."
    rows = [
        (str(count), f"{solver.error:.2g}", f"{solver.guidance_scale:g}", solver.reference)
        for count, solver in sorted(solvers.items())
    ]
    header = ("evaluations", "error, held out", "guidance", "of the result of")
    return _table(header, rows) + '\n\n`model.generate(eva, EVALUATIONS, solver="fitted")`'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells may come from files of others."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return one_line(text).replace("|", "/").replace("<", "&lt;")
