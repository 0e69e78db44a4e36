"""Many training steps: how many have gradients with NaN or Inf, and how long steps take and wait.

    python benchmarks/long_training.py --json long.json [--steps 2000] [--batch 128]

The whole trainer runs on shards of random embeddings: loader, loss, clipping, AdamW, records. It
validates only at the end. Exits with 1 if a step was skipped. Seconds a step are of the second
half, when everything is warm.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result_tables import show

from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import write_shards
from blip3o_fast.config import PRESETS
from blip3o_fast.training import TrainingOptions, train
from blip3o_fast.training.step_records import StepRecord

KIND = "blip3o-fast long training"
FORMAT = 1
HELD_OUT = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a line, write JSON."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    shape = Shape(args.preset, args.batch)
    environment = describe_environment(device)
    records = take_steps(shape, args)
    content = {
        "kind": KIND,
        "format": FORMAT,
        "task": {"shape": shape.name, "dtype": args.precision, "scales": args.scales},
        "environment": environment,
        **summarise(records),
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    print(show(content))
    if args.json is not None:
        write_json(args.json, content)
    return 1 if content["skipped"] else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="optimizer steps")
    add("--preset", default="base", choices=tuple(PRESETS))
    add("--batch", type=int, default=128, help="samples a step")
    add("--samples", type=int, default=1024, help="of the data set, besides a few held out")
    add("--scales", type=float, nargs=2, default=[1.0, 1.0], metavar=("EVA", "CLIP"),
        help="standard deviations of the random embeddings")  # fmt: skip
    add("--precision", default="bf16", choices=("bf16", "fp16", "fp32"))
    add("--learning_rate", type=float, default=1e-4)
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--json", type=Path, help="where to write the result")
    return parser.parse_args(arguments)


def take_steps(shape: Shape, args: argparse.Namespace) -> list[StepRecord]:
    """The record of every step."""
    records: list[StepRecord] = []
    with tempfile.TemporaryDirectory(prefix="blip3o-fast-long-") as folder:
        shards = Path(folder) / "shards"
        torch.manual_seed(0)
        scales = (args.scales[0], args.scales[1])
        write_shards(
            shards, shape.config, args.samples + HELD_OUT, held_out=HELD_OUT, scales=scales
        )
        options = TrainingOptions(
            chunked_embeddings_dir=str(shards),
            output_dir=str(Path(folder) / "run"),
            model_size=shape.preset,
            batch_size=shape.batch,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            precision=args.precision,
            device=args.device,
            eval_every_n_steps=args.steps,
            save_every_n_steps=args.steps,
            max_nonfinite_steps=args.steps,
            progress=False,
        )
        train(options, on_step=records.append)
    return records


def summarise(records: Sequence[StepRecord]) -> dict[str, Any]:
    """Counts and losses of all steps; times are medians of the second half."""
    warm = records[len(records) // 2 :]
    losses = [record.loss for record in records if record.loss is not None]
    return {
        "steps": len(records),
        "skipped": sum(record.skipped for record in records),
        "clipped": sum(record.clipped for record in records),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": median(record.seconds for record in warm),
        "data_wait": median(record.data_wait for record in warm),
    }


if __name__ == "__main__":
    sys.exit(main())
