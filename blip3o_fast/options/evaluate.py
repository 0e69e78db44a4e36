"""What ``blip3o-fast evaluate`` takes."""

import argparse
from dataclasses import dataclass
from typing import Annotated, Literal

from blip3o_fast.checked import Count, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import Flag, add_flags
from blip3o_fast.words import DeviceName, DtypeName, GridName, SolverName


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate``."""
    add_flags(parser, EvaluateOptions)
