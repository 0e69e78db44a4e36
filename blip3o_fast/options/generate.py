"""What ``blip3o-fast generate`` takes."""

import argparse
from dataclasses import dataclass
from typing import Literal

from blip3o_fast.checked import Count, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import add_flags
from blip3o_fast.words import DeviceName, DtypeName, GridName, SolverName


@dataclass(frozen=True)
class TranslationOptions:
    """What to translate, by what, and how.

    Attributes:
        model_path: checkpoint folder, training run, .pt file, or hf:owner/name on the hub.
        embeddings_dir: folder of shards with EVA embeddings.
        output_dir: folder for the CLIP shards; continued if unfinished.
        split: side to translate.

    Attributes: Model
        revision: commit, tag or branch of a repository of the hub.
        num_attention_heads, num_key_value_heads: needed for a .pt file without its configuration.
        dtype: element type of weights and activations; fp8: most matrix products in e4m3, less
            exact, on GPUs that have it; None: as stored.

    Attributes: Sampling
        num_inference_steps: solver steps; a single euler step gives the conditional mean.
        solver: solver of the ODE; heun and midpoint call the network twice per step.
        guidance_scale: weight of the condition over the empty condition; 1: no guidance.
        time_grid: times of the solver's steps; None: those of the model's conventions.
        seed: decides the noise of a sample together with its key.

    Attributes: Execution
        batch_size: samples that a process translates at once.
        device: device to run on; auto: cuda if there is a GPU.
        graph: replay steps as CUDA graphs; None: only on CUDA.
        compile: apply torch.compile to each call of the network.
        progress: show a bar with samples/s and time left.

    Attributes: Output
        store_dtype: element type of the shards.
        samples_per_shard: rows of a full shard.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    model_path: str
    embeddings_dir: str
    output_dir: str
    split: Literal["all", "train", "heldout"] = "all"
    num_inference_steps: Count = 50
    solver: SolverName = "heun"
    guidance_scale: float = 1.0
    time_grid: GridName | None = None
    seed: int = 0
    batch_size: Count = 64
    samples_per_shard: Count = 256
    dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    store_dtype: DtypeName = "fp16"
    revision: str | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    device: DeviceName = "auto"
    graph: bool | None = None
    compile: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check(self, error=OptionError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``generate``."""
    add_flags(parser, TranslationOptions)
