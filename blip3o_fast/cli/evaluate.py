"""``blip3o-fast evaluate``: a model beside its baselines, on shards or on a published COCO file.

Ends with one table, and ``report.json``, ``samples.csv``, plots and ``report.html`` in the output
folder. The baselines are fitted on training shards (``--chunked_embeddings_dir``). Without those,
some photos of the evaluated data are used to fit them and are not evaluated.
"""

import argparse
from pathlib import Path

import torch

from blip3o_fast.atomic import locked
from blip3o_fast.data import EmbeddingDataset, Wishes
from blip3o_fast.data.conversion import verify_conversion, write_planned
from blip3o_fast.data.conversion_plan import open_sources, plan_conversion
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.evaluation import require_plots, terminal_table, write_report
from blip3o_fast.evaluation.evaluate import EvaluationSettings, evaluate_model
from blip3o_fast.flags import given
from blip3o_fast.flow import find_solver
from blip3o_fast.hub import typed
from blip3o_fast.options.evaluate import EvaluateOptions
from blip3o_fast.pretrained import BLIP3oDiT, load_trained_model


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the report."""
    options = EvaluateOptions(**given(EvaluateOptions, args))
    with locked(Path(options.output_dir)):
        return evaluate(options)


def evaluate(options: EvaluateOptions) -> int:
    """What ``run`` does while no other process writes to the folder."""
    if options.plots:
        require_plots()
    device = find_device(options.device)
    model = load_trained_model(
        typed(options.model_path),
        revision=options.revision,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        device=device,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
    )
    check_mode(options.training_mode, model)
    regression = None
    if options.regression_path is not None:
        regression = load_trained_model(
            Path(options.regression_path), device=device, dtype=model.dtype
        )
    training, heldout = open_data(options, model)
    report = evaluate_model(
        model,
        training,
        heldout,
        settings_of(options),
        title=f"{Path(options.model_path).name} on {heldout.folder.name}",
        facts={
            "model": f"{options.model_path}, {model.get_num_parameters():,} parameters, "
            f"{model.config.conventions} conventions",
            "evaluated on": f"{heldout.folder}, {heldout.split} side of {heldout.photos} photos",
            "baselines fitted on": f"{training.folder}, {training.split} side",
            "precision": str(model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        },
        regression=regression,
    )
    page = write_report(report, options.output_dir, plots=options.plots)
    print(terminal_table(report))
    print(f"\nReport: {page}")
    return 0


def settings_of(options: EvaluateOptions) -> EvaluationSettings:
    """How to measure."""
    most = options.num_inference_steps * find_solver(options.method).evaluations_per_step
    return EvaluationSettings(
        evaluations=options.evaluations or (*(n for n in (1, 2, 4, 10, 25) if n < most), most),
        solver=options.method,
        guidance_scale=options.guidance_scale,
        time_grid=options.time_grid,
        batch_size=options.batch_size,
        seed=options.seed,
        max_samples=options.max_samples,
        max_training_samples=options.max_training_samples,
    )


def check_mode(mode: str | None, model: BLIP3oDiT) -> None:
    """Raise unless the model has the token layout that was asked for."""
    has = "cls_patch" if model.config.has_cls else "patch_only"
    if mode not in (None, has):
        raise OptionError(f"training_mode: expected {has}, that of the model, got {mode}")


def open_data(
    options: EvaluateOptions, model: BLIP3oDiT
) -> tuple[EmbeddingDataset, EmbeddingDataset]:
    """What the baselines learn from, and what is evaluated; they share no photo."""
    if options.coco_embeddings_file is not None:
        folder = converted(Path(options.coco_embeddings_file), options.output_dir, model)
    else:
        assert options.embeddings_dir is not None
        folder = Path(options.embeddings_dir)
    tokens = model.config.num_tokens
    if options.chunked_embeddings_dir:
        training = EmbeddingDataset(
            options.chunked_embeddings_dir,
            split="train",
            heldout_fraction=options.heldout_fraction,
            tokens=tokens,
        )
        same = training.folder.resolve() == folder.resolve()
        side = "heldout" if same else "all"
        fraction = options.heldout_fraction if same else None
        return training, EmbeddingDataset(
            folder, split=side, heldout_fraction=fraction, tokens=tokens
        )
    fraction = options.heldout_fraction
    if fraction is None and EmbeddingDataset(folder).manifest.split.heldout_fraction == 0:
        fraction = 0.5
    train, heldout = (
        EmbeddingDataset(folder, split=side, heldout_fraction=fraction, tokens=tokens)
        for side in ("train", "heldout")
    )
    return train, heldout


def converted(source: Path, output_dir: str, model: BLIP3oDiT) -> Path:
    """Shards of the published COCO pickle, made beside the report, or found there and compared."""
    folder = Path(output_dir) / f"{source.stem}_shards"
    wishes = Wishes(grid=model.config.patches, heldout_fraction=0.0)
    plan = plan_conversion(open_sources(source), wishes)
    expected = (model.config.eva_embedding_size, model.config.clip_embedding_size)
    got = (plan.facts.eva_width, plan.facts.clip_width)
    if expected != got:
        raise OptionError(
            f"coco_embeddings_file: expected widths {expected} (EVA, CLIP), those of the model, "
            f"got {got}"
        )
    write_planned(plan, folder)
    verify_conversion(plan, folder)
    return folder
