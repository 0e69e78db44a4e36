"""What training at t = 0 buys and costs: translation in one evaluation against samples.

    python benchmarks/zero_time.py --shards demo/shards --output_dir zero_time --json OUT

The model of ``blip3o-fast demo`` is trained with several shares of each batch at t = 0
(``zero_time_fraction``), over several seeds. A share of 1 is plain regression by the same network.
Each is measured on held-out crops in one evaluation, which translates, and with many, which
samples; ridge regression stands beside them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from result_tables import show

from blip3o_fast import load_trained_model
from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.demo.pipeline import MODEL, TRAINING
from blip3o_fast.devices import cpu_has_bf16
from blip3o_fast.evaluation import Metrics
from blip3o_fast.evaluation.evaluate import EvaluationSettings, evaluate_model
from blip3o_fast.training import TrainingOptions, train

CPU = torch.device("cpu")
SAMPLING = 50  # evaluations of Heun's method


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shards", required=True, help="shards of blip3o-fast demo")
    add("--output_dir", required=True, help="folder of the runs")
    add("--json", required=True, help="where to write the figures")
    add("--fractions", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0], help="shares")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    add("--steps", type=int, default=600, help="optimizer steps of each model")
    add("--max_samples", type=int, default=96, help="held-out crops")
    args = parser.parse_args()
    training = EmbeddingDataset(args.shards, split="train")
    heldout = EmbeddingDataset(args.shards, split="heldout")
    settings = EvaluationSettings(
        evaluations=(1, SAMPLING), batch_size=32, max_samples=args.max_samples, photos=0
    )
    rows: list[dict[str, Any]] = []
    ridge: dict[str, float] = {}
    for seed in args.seeds:
        for fraction in args.fractions:
            run = Path(args.output_dir) / f"{fraction:g}_{seed}"
            options = TrainingOptions(
                chunked_embeddings_dir=args.shards,
                output_dir=str(run),
                max_steps=args.steps,
                seed=seed,
                precision="bf16" if cpu_has_bf16() else "fp32",
                eval_every_n_steps=args.steps,
                **(MODEL | TRAINING | {"zero_time_fraction": fraction}),
            )
            train(options)
            model = load_trained_model(run)
            report = evaluate_model(model, training, heldout, settings, progress=False)
            ridge = figures(report.ridge.metrics)
            one, many = (figures(result.metrics) for result in report.dit)
            rows.append({"fraction": fraction, "seed": seed, "one": one, "many": many})
            print(json.dumps(rows[-1]), flush=True)
    facts = {
        "benchmark": "zero_time",
        "environment": describe_environment(CPU),
        "data": f"{len(training)} crops of {training.photos} photos to learn from, "
        f"{args.max_samples} of {len(heldout)} held-out crops translated",
        "steps": args.steps,
        "sampling": SAMPLING,
        "ridge": ridge,
        "rows": rows,
    }
    write_json(Path(args.json), facts)
    print(show(facts))


def figures(metrics: Metrics) -> dict[str, Any]:
    """What the table shows."""
    return {
        "token_cosine": metrics.token_cosine.value,
        "image_cosine": metrics.image_cosine.value,
        "recall_at_1": metrics.recall_generated_to_target[1].value,
        "variance_ratio": metrics.variance_ratio.value,
        "energy_distance": metrics.energy_distance,
    }


if __name__ == "__main__":
    main()
