"""The ``consistent`` and the ``published`` conventions with the same data, seed, steps and sizes.

    python benchmarks/conventions.py --shards demo/shards --output_dir conventions

Three small models learn from the shards of ``blip3o-fast demo``: the consistent network with its
loss, the consistent network with the published loss (the other sign of the clean estimate, masks
and caps), and the published network with its loss. Each translates the same held-out crops from the
same noise under both samplers. Prints a table and writes it as JSON, with the mean predictor and
ridge regression as baselines. Also draws the held-out cosine of one evaluation during training.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from result_tables import show

from blip3o_fast import BLIP3oDiT, load_trained_model
from blip3o_fast.atomic import write_atomically, write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.demo.pipeline import MODEL, TRAINING
from blip3o_fast.evaluation import Metrics
from blip3o_fast.evaluation.evaluate import EvaluationSettings, evaluate_model
from blip3o_fast.flow import RectifiedFlowLoss
from blip3o_fast.processes import World
from blip3o_fast.training import TrainingOptions
from blip3o_fast.training.run import claimed, prepare
from blip3o_fast.training.tracking import METRICS_NAME
from blip3o_fast.training.trainer import Trainer

Conventions = Literal["consistent", "published"]
MODELS: tuple[tuple[Conventions, Conventions], ...] = (
    ("consistent", "consistent"),
    ("consistent", "published"),
    ("published", "published"),
)
"""Conventions of the network, and of the loss."""
SAMPLERS = ("ascending", "published")
CPU = torch.device("cpu")


def main() -> None:
    """Train, sample, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True, help="shards of blip3o-fast demo")
    parser.add_argument("--output_dir", required=True, help="folder of the three runs")
    parser.add_argument("--json", help="where to write the table; None: conventions.json there")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each model")
    parser.add_argument(
        "--validate_every", type=int, default=50, help="steps between points of the curve"
    )
    parser.add_argument("--max_samples", type=int, default=48, help="held-out crops translated")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[1, 4, 10, 50])
    args = parser.parse_args()
    started = time.monotonic()
    folder = Path(args.output_dir)
    heldout = EmbeddingDataset(args.shards, split="heldout")
    training = EmbeddingDataset(args.shards, split="train")

    rows: list[dict[str, Any]] = []
    levels: dict[str, float] = {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for network, loss in MODELS:
        run = folder / f"{network}_{loss}"
        model = trained(args, run, network, loss)
        curves[f"{network} network, {loss} loss"] = learning_curve(run)
        for sampler in SAMPLERS:
            settings = EvaluationSettings(
                evaluations=tuple(args.evaluations),
                time_grid=sampler,
                batch_size=16,
                max_samples=args.max_samples,
                max_training_samples=800,
                photos=0,
                bootstrap=500,
            )
            report = evaluate_model(model, training, heldout, settings, progress=False)
            if not levels:
                baselines = {"mean predictor": report.mean.metrics, "ridge": report.ridge.metrics}
                rows += [row(metrics, name) for name, metrics in baselines.items()]
                levels = {name: m.token_cosine.value for name, m in baselines.items()}
            rows += [
                row(result.metrics, network, loss, sampler, result.evaluations or 0)
                for result in report.dit
            ]
        print(f"{network} network, {loss} loss: {time.monotonic() - started:.0f} s", flush=True)
    facts = {
        "benchmark": "conventions",
        "environment": describe_environment(CPU),
        "data": f"{len(training)} crops of {training.photos} photos to learn from, "
        f"{args.max_samples} of {len(heldout)} held-out crops translated",
        "steps": args.steps,
        "model": MODEL,
        "training": TRAINING,
        "seconds": round(time.monotonic() - started),
        "rows": rows,
        "curves": curves,
    }
    path = Path(args.json or folder / "conventions.json")
    write_json(path, facts)
    write_atomically(path.with_suffix(".png"), draw(curves, levels))
    print(show(facts))


def trained(
    args: argparse.Namespace, folder: Path, network: Conventions, loss: Conventions
) -> BLIP3oDiT:
    """Train, or go on; the weight average after the last step."""
    values: dict[str, Any] = {**MODEL, **TRAINING, "eval_every_n_steps": args.validate_every}
    values["zero_time_fraction"] = 0.0  # as published
    options = TrainingOptions(
        chunked_embeddings_dir=args.shards,
        output_dir=str(folder),
        max_steps=args.steps,
        conventions=network,
        precision="bf16",
        **values,
    )
    plan = prepare(options, World())
    trainer = Trainer(plan, World())
    trainer.step.loss = RectifiedFlowLoss(conventions=loss)
    with claimed(plan):
        trainer.run()
    return load_trained_model(folder / f"step_{args.steps}")


def learning_curve(run: Path) -> list[tuple[int, float]]:
    """Step and held-out token cosine of every validation of a run."""
    records = [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]
    return [(r["step"], r["token_cosine"]) for r in records if r["kind"] == "validation"]


def draw(curves: dict[str, list[tuple[int, float]]], levels: dict[str, float]) -> bytes:
    """A PNG of the curves over the baselines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    for (name, level), style in zip(levels.items(), (":", "--"), strict=True):
        axes.axhline(level, linestyle=style, color="0.4", label=name)
    axes.set(xlabel="optimizer step", ylabel="token cosine on held-out photos")
    axes.legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def row(
    metrics: Metrics, network: str, loss: str = "", sampler: str = "", evaluations: int = 0
) -> dict[str, Any]:
    """The figures of one predictor on the held-out crops."""
    token = metrics.token_cosine
    return {
        "token_cosine": token.value,
        "token_cosine_interval": [token.low, token.high],
        "image_cosine": metrics.image_cosine.value,
        "r2": metrics.r2.value,
        "network": network,
        "loss": loss,
        "sampler": sampler,
        "evaluations": evaluations,
    }


if __name__ == "__main__":
    main()
