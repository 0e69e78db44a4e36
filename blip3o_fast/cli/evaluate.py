"""``blip3o-fast evaluate``: a model beside its baselines, on shards or on a published COCO file.

Ends with one table, and ``report.json``, ``samples.csv``, plots and ``report.html`` in the output
folder. The baselines are fitted on training shards (``--chunked_embeddings_dir``), or, where those
are not at hand, on photos of the evaluated file that are not evaluated.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blip3o_fast.cli.switch import add_switch
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import OptionError

if TYPE_CHECKING:
    from blip3o_fast import BLIP3oDiT
    from blip3o_fast.data import EmbeddingDataset
    from blip3o_fast.evaluation.evaluate import EvaluationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate``; those of the published ``eval_blip3o_coco.py`` keep their names."""
    add = parser.add_argument
    add(
        "--model_path",
        required=True,
        help="checkpoint folder, training run, .pt file or owner/name",
    )
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--coco_embeddings_file", help="published COCO pickle, converted once")
    data.add_argument("--embeddings_dir", help="folder of paired shards to evaluate on")
    add("--chunked_embeddings_dir", help="training shards, which the baselines are fitted on")
    add("--output_dir", default="evaluation", help="folder for the report")
    add("--max_samples", type=int, help="evaluate at most so many samples; None: all")
    add("--batch_size", type=int, default=64, help="samples translated at once")
    add("--num_inference_steps", type=int, default=50, help="most solver steps")
    add_switch(parser, "use_heun", default=True, text="Heun's method; off: Euler's")
    add(
        "--evaluations",
        type=int,
        nargs="+",
        help="numbers of network evaluations; None: 1 2 4 10 25 and those of num_inference_steps",
    )
    add(
        "--training_mode",
        choices=("patch_only", "cls_patch"),
        help="expected token layout; None: the model's",
    )
    add("--guidance_scale", type=float, default=1.0, help="1 is no guidance")
    add(
        "--time_grid",
        choices=("ascending", "published", "published_trainer"),
        help="of the sampler; None: the model's conventions",
    )
    add("--heldout_fraction", type=float, help="share of photos evaluated; None: the manifest's")
    add("--max_training_samples", type=int, default=2000, help="that the baselines are fitted on")
    add("--num_attention_heads", type=int, help="for a .pt file without its configuration")
    add("--num_key_value_heads", type=int, help="for a .pt file without its configuration")
    add("--seed", type=int, default=0, help="with a sample's key, decides its noise")
    add("--dtype", choices=tuple(DTYPES), help="of the model; None: as stored")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device")
    add_switch(parser, "plots", default=True, text="draw the pictures (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the report."""
    from blip3o_fast import load_trained_model
    from blip3o_fast.evaluation import require_plots, terminal_table, write_report
    from blip3o_fast.evaluation.evaluate import evaluate_model

    if args.plots:
        require_plots()
    settings = read_settings(args)
    device = find_device(args.device)
    model = load_trained_model(
        args.model_path,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        device=device,
        dtype=DTYPES.get(args.dtype),
    )
    check_mode(args.training_mode, model)
    training, heldout = open_data(args, model)
    report = evaluate_model(
        model,
        training,
        heldout,
        settings,
        title=f"{Path(args.model_path).name} on {heldout.folder.name}",
        facts={
            "model": f"{args.model_path}, {model.get_num_parameters():,} parameters, "
            f"{model.config.conventions} conventions",
            "evaluated on": f"{heldout.folder}, {heldout.split} side of {heldout.photos} photos",
            "baselines fitted on": f"{training.folder}, {training.split} side",
            "precision": str(model.input_proj.weight.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        },
    )
    page = write_report(report, args.output_dir, plots=args.plots)
    print(terminal_table(report))
    print(f"\nReport: {page}")
    return 0


def read_settings(args: argparse.Namespace) -> "EvaluationSettings":
    """The settings that the options ask for."""
    from blip3o_fast.evaluation.evaluate import EvaluationSettings

    if args.num_inference_steps < 1:
        raise OptionError(
            f"num_inference_steps: expected at least 1, got {args.num_inference_steps}"
        )
    most = args.num_inference_steps * (2 if args.use_heun else 1)
    counts = args.evaluations or [n for n in (1, 2, 4, 10, 25) if n < most] + [most]
    try:
        return EvaluationSettings(
            evaluations=tuple(counts),
            solver="heun" if args.use_heun else "euler",
            guidance_scale=args.guidance_scale,
            time_grid=args.time_grid,
            batch_size=args.batch_size,
            seed=args.seed,
            max_samples=args.max_samples,
            max_training_samples=args.max_training_samples,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None


def check_mode(mode: str | None, model: "BLIP3oDiT") -> None:
    """Raise unless the model has the token layout that was asked for."""
    has = "cls_patch" if model.config.has_cls else "patch_only"
    if mode not in (None, has):
        raise OptionError(f"training_mode: expected {has}, that of the model, got {mode}")


def open_data(
    args: argparse.Namespace, model: "BLIP3oDiT"
) -> "tuple[EmbeddingDataset, EmbeddingDataset]":
    """What the baselines learn from, and what is evaluated; they share no photo."""
    from blip3o_fast.data import EmbeddingDataset

    folder = Path(args.embeddings_dir) if args.embeddings_dir else converted(args, model)
    tokens = model.config.num_tokens
    if args.chunked_embeddings_dir:
        training = EmbeddingDataset(
            args.chunked_embeddings_dir,
            split="train",
            heldout_fraction=args.heldout_fraction,
            tokens=tokens,
        )
        same = training.folder.resolve() == folder.resolve()
        side = "heldout" if same else "all"
        fraction = args.heldout_fraction if same else None
        return training, EmbeddingDataset(
            folder, split=side, heldout_fraction=fraction, tokens=tokens
        )
    fraction = args.heldout_fraction
    if fraction is None and EmbeddingDataset(folder).manifest.split.heldout_fraction == 0:
        fraction = 0.5
    train, heldout = (
        EmbeddingDataset(folder, split=side, heldout_fraction=fraction, tokens=tokens)
        for side in ("train", "heldout")
    )
    return train, heldout


def converted(args: argparse.Namespace, model: "BLIP3oDiT") -> Path:
    """Shards of the published COCO pickle, made beside the report on first use."""
    from blip3o_fast.data import Wishes, convert
    from blip3o_fast.data.manifest import MANIFEST_NAME

    source = Path(args.coco_embeddings_file)
    folder = Path(args.output_dir) / f"{source.stem}_shards"
    if not (folder / MANIFEST_NAME).is_file():
        convert(source, folder, Wishes(grid=model.config.patches, heldout_fraction=0.0))
    return folder
