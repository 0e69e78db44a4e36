"""``blip3o-fast demo``: real photos to a trained translator and an honest report, on any machine.

Photos -> tokens of two small pretrained encoders -> shards -> a small DiT learns to translate one
encoder's tokens into the other's -> held-out photos are translated -> the result stands beside the
mean predictor and a tuned ridge regression. Every stage goes on where an interrupted run stopped.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from blip3o_fast.cli.switch import add_switch
from blip3o_fast.devices import find_device
from blip3o_fast.errors import OptionError

if TYPE_CHECKING:
    from blip3o_fast.data import SampleRecord
    from blip3o_fast.evaluation import Report
    from blip3o_fast.extraction.sources import ImageRef
    from blip3o_fast.extraction.views import Settings

HELDOUT_FRACTION = 0.2
SEED = 0

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "eva_adapter_layers": 2,
    "eva_adapter_dropout": 0.0,
    "initializer_range": 0.02,
    "rope_theta": 100.0,
}
"""Small enough for two cores. Sixteen positions an axis want short rotary periods."""

VALIDATE_EVERY = 100  # steps
TRAINING = {
    "batch_size": 16,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "adam_beta2": 0.99,
    "ema_decay": 0.99,
    "simple_scale_factor": "auto",
    "eval_num_samples": 32,
    "eval_inference_steps": 1,
    "use_heun_inference": False,
    "save_every_n_steps": 200,
}
"""Validated with one Euler step, which estimates the conditional mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    parser.add_argument("--output_dir", default="demo", help="folder for everything the demo makes")
    parser.add_argument(
        "--images", help="folder of your own images; None: photos of installed packages"
    )
    parser.add_argument("--max_images", type=int, help="use at most so many images; None: all")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 16 samples")
    parser.add_argument(
        "--max_samples", type=int, default=96, help="held-out crops that are translated"
    )
    parser.add_argument(
        "--evaluations",
        type=int,
        nargs="+",
        default=[1, 2, 4, 10, 25, 50, 100],
        help="numbers of network evaluations to sample with",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device")
    add_switch(parser, "progress", default=True, text="show bars")


def run(args: argparse.Namespace) -> int:
    """Extract, train, evaluate; print the table and where the report is."""
    for name in ("steps", "max_samples"):
        if getattr(args, name) < 1:
            raise OptionError(f"{name}: expected at least 1, got {getattr(args, name)}")
    from blip3o_fast.evaluation import require_plots, terminal_table, write_report
    from blip3o_fast.training import TrainingInterrupted

    require_plots()
    device = find_device(args.device)
    folder = Path(args.output_dir)
    started = time.monotonic()

    refs = find_photos(args)
    samples, photos = extract_tokens(refs, folder / "shards", device, args.progress)
    say(
        started, f"{samples} crops of {len(refs)} photos, {photos} held out, in {folder / 'shards'}"
    )
    try:
        losses = train_model(args, folder, device)
    except TrainingInterrupted as stop:
        print(f"blip3o-fast demo: {stop}; run again to go on", file=sys.stderr)
        return stop.exit_status
    say(started, f"trained for {args.steps} steps, in {folder / 'run'}")
    report = evaluate(args, folder, device, refs, losses)
    page = write_report(report, folder / "report")
    say(started, "evaluated on photos that training never saw")
    print()
    print(terminal_table(report))
    print(f"\nReport: {page}")
    return 0


def say(started: float, text: str) -> None:
    """One line of progress with the minutes so far."""
    print(f"[{(time.monotonic() - started) / 60:4.1f} min] {text}", flush=True)


def find_photos(args: argparse.Namespace) -> "list[ImageRef]":
    """The photos of ``--images``, or those of installed packages."""
    from blip3o_fast.extraction.photos import demo_photos, folder_photos

    refs = folder_photos(args.images) if args.images else demo_photos()
    if args.max_images is not None:
        refs = refs[:: max(1, len(refs) // max(1, args.max_images))][: args.max_images]
    return refs


def extract_tokens(
    refs: "list[ImageRef]", shards: Path, device: torch.device, progress: bool
) -> tuple[int, int]:
    """Encode the crops of all photos; the number of samples, and of photos held out."""
    from blip3o_fast.data import EmbeddingDataset
    from blip3o_fast.extraction.encoders import load_towers
    from blip3o_fast.extraction.extract import extract

    towers = load_towers("lite", device=device)
    settings = extraction_settings(refs)
    extract(refs, towers, shards, settings, resume=shards.exists(), progress=progress)
    return len(EmbeddingDataset(shards)), EmbeddingDataset(shards, split="heldout").photos


def extraction_settings(refs: "list[ImageRef]") -> "Settings":
    """What the crops depend on, for extraction and for finding a crop again."""
    from blip3o_fast.data.manifest import Split
    from blip3o_fast.extraction.photos import heldout_scenes
    from blip3o_fast.extraction.views import Settings

    heldout = heldout_scenes(refs, HELDOUT_FRACTION)
    return Settings(seed=SEED, mirror=True, split=Split(HELDOUT_FRACTION, heldout_sources=heldout))


def train_model(
    args: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[tuple[int, float], ...]:
    """Train, or go on; the losses by step."""
    from blip3o_fast.training import TrainingOptions, train

    options = TrainingOptions(
        chunked_embeddings_dir=str(folder / "shards"),
        output_dir=str(folder / "run"),
        max_steps=args.steps,
        eval_every_n_steps=min(VALIDATE_EVERY, args.steps),
        device="cuda" if device.type == "cuda" else "cpu",
        precision="bf16" if device.type == "cuda" or _cpu_has_bf16() else "fp32",
        progress=args.progress,
        seed=SEED,
        **MODEL,
        **TRAINING,
    )
    return train(options).losses


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; where it does not, fp32 is faster.

    A torch that cannot tell counts as no.
    """
    tell = getattr(torch.cpu, "get_capabilities", dict)
    return bool(tell().get("avx512_bf16", False))


def evaluate(
    args: argparse.Namespace,
    folder: Path,
    device: torch.device,
    refs: "list[ImageRef]",
    losses: tuple[tuple[int, float], ...],
) -> "Report":
    """Measure the best checkpoint on held-out crops beside the baselines."""
    from blip3o_fast import load_trained_model
    from blip3o_fast.benchmarking.environment import describe_environment
    from blip3o_fast.data import EmbeddingDataset
    from blip3o_fast.evaluation.evaluate import EvaluationSettings, evaluate_model
    from blip3o_fast.extraction.extract import open_view

    model = load_trained_model(folder / "run", device=device)
    by_key = {ref.key: ref for ref in refs}
    settings = extraction_settings(refs)

    def crop(record: "SampleRecord") -> np.ndarray | None:
        ref = by_key.get(record.key) or by_key.get(record.key.rpartition("#")[0])
        return None if ref is None else np.asarray(open_view(ref, record.key, settings))

    shards = folder / "shards"
    training = EmbeddingDataset(shards, split="train")
    heldout = EmbeddingDataset(shards, split="heldout")
    measure = EvaluationSettings(
        evaluations=tuple(args.evaluations), batch_size=32, max_samples=args.max_samples, seed=SEED
    )
    environment = describe_environment(device)
    facts = {
        "photos": f"{training.photos} to learn from, {heldout.photos} held out",
        "crops": f"{len(training)} to learn from, {len(heldout)} held out, "
        f"{args.max_samples} of these evaluated",
        "translation": "EfficientNet-Lite2 tokens [256, 120] to Lite0 tokens [256, 112]",
        "model": f"{model.get_num_parameters():,} parameters, {args.steps} steps of "
        f"{TRAINING['batch_size']} samples",
        "device": environment["device"],
        "versions": ", ".join(f"{name} {x}" for name, x in environment["versions"].items()),
        "commit": environment["commit"] or "not run from a clone",
    }
    return evaluate_model(
        model,
        training,
        heldout,
        dataclasses.replace(measure, max_samples=min(args.max_samples, len(heldout))),
        title="EfficientNet-Lite2 to Lite0 by rectified flow, on held-out photos",
        facts=facts,
        history=losses,
        image_of=crop,
        progress=args.progress,
    )
