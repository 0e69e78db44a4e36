"""``blip3o-fast evaluate``: a model beside its baselines, on shards or on a published COCO file.

Ends with one table, and ``report.json``, ``samples.csv``, plots and ``report.html`` in the output
folder. The baselines are fitted on training shards (``--chunked_embeddings_dir``). Without those,
some photos of the evaluated data are used to fit them and are not evaluated.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from blip3o_fast.atomic import locked
from blip3o_fast.checked import Count, check
from blip3o_fast.data import EmbeddingDataset, Wishes
from blip3o_fast.data.conversion import verify_conversion, write_planned
from blip3o_fast.data.conversion_plan import open_sources, plan_conversion
from blip3o_fast.devices import DTYPES, DeviceName, DtypeName, find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.evaluation import require_plots, terminal_table, write_report
from blip3o_fast.evaluation.evaluate import EvaluationSettings, evaluate_model
from blip3o_fast.flags import Flag, add_flags, given
from blip3o_fast.flow import find_solver
from blip3o_fast.flow.schedule import GridName
from blip3o_fast.flow.solvers import SolverName
from blip3o_fast.hub import typed
from blip3o_fast.pretrained import BLIP3oDiT, load_trained_model


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``evaluate``; those of the published ``eval_blip3o_coco.py`` keep their names.

    Attributes:
        model_path: checkpoint folder, training run, .pt file, or hf:owner/name on the hub.
        coco_embeddings_file: published COCO pickle, converted to shards on first use.
        embeddings_dir: folder of paired shards to evaluate on.
        output_dir: folder for the report.
        plots: draw the pictures (needs matplotlib).

    Attributes: Model
        revision: commit, tag or branch of a repository of the hub.
        num_attention_heads, num_key_value_heads: needed for a .pt file without its configuration.
        training_mode: expected token layout; None: the model's.
        dtype: element type of the model; None: as stored.
        device: device to run on; auto: cuda if there is a GPU.

    Attributes: Baselines
        chunked_embeddings_dir: training shards, which the baselines are fitted on.
        max_training_samples: most training samples that the baselines are fitted on.
        regression_path: checkpoint of the same network trained with zero_time_fraction 1, one more
            baseline; None: none.

    Attributes: Samples
        max_samples: evaluate at most so many samples; None: all.
        heldout_fraction: share of photos evaluated; None: the manifest's.
        batch_size: samples translated at once.

    Attributes: Sampling
        evaluations: numbers of calls of the network to measure with; None: 1 2 4 10 25 and those of
            num_inference_steps.
        num_inference_steps: largest number of solver steps.
        solver: solver of the ODE; heun and midpoint call the network twice per step.
        use_heun: the published name of solver: on is heun, off euler.
        guidance_scale: weight of the condition over the empty condition; 1: no guidance.
        time_grid: times of the solver's steps; None: those of the model's conventions.
        seed: decides the noise of a sample together with its key.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    model_path: str
    coco_embeddings_file: Annotated[str | None, Flag(one_of="data")] = None
    embeddings_dir: Annotated[str | None, Flag(one_of="data")] = None
    chunked_embeddings_dir: str | None = None
    regression_path: str | None = None
    output_dir: str = "evaluation"
    max_samples: int | None = None
    batch_size: Count = 64
    num_inference_steps: Count = 50
    solver: SolverName = "heun"
    use_heun: bool | None = None
    evaluations: tuple[Count, ...] | None = None
    training_mode: Literal["patch_only", "cls_patch"] | None = None
    guidance_scale: float = 1.0
    time_grid: GridName | None = None
    heldout_fraction: float | None = None
    max_training_samples: int = 2000
    revision: str | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    seed: int = 0
    dtype: DtypeName | None = None
    device: DeviceName = "auto"
    plots: bool = True

    def __post_init__(self) -> None:
        check(self, error=OptionError)
        if self.solver == "fitted":
            raise OptionError(
                "solver: expected the name of a solver, got fitted; fitted solvers are measured "
                "beside it wherever the model has some"
            )
        if self.use_heun is not None and self.solver not in ("heun", self.method):
            raise OptionError(
                f"solver: expected {self.method}, as use_heun says, or no use_heun, got "
                f"{self.solver}"
            )

    @property
    def method(self) -> SolverName:
        """The solver's name, whichever option gives it."""
        return self.solver if self.use_heun is None else ("heun" if self.use_heun else "euler")

    def settings(self) -> EvaluationSettings:
        """How to measure."""
        most = self.num_inference_steps * find_solver(self.method).evaluations_per_step
        return EvaluationSettings(
            evaluations=self.evaluations or (*(n for n in (1, 2, 4, 10, 25) if n < most), most),
            solver=self.method,
            guidance_scale=self.guidance_scale,
            time_grid=self.time_grid,
            batch_size=self.batch_size,
            seed=self.seed,
            max_samples=self.max_samples,
            max_training_samples=self.max_training_samples,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate``."""
    add_flags(parser, EvaluateOptions)


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
        options.settings(),
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
