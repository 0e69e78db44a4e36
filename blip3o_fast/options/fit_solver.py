"""What ``blip3o-fast fit-solver`` takes."""

import argparse
from dataclasses import dataclass

from blip3o_fast.checked import Count, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import add_flags
from blip3o_fast.words import DeviceName, DtypeName


@dataclass(frozen=True)
class FitOptions:
    """What to fit, to which model, on what.

    Attributes:
        model_path: checkpoint folder, training run or .pt file; ``solver.json`` is written there.
        embeddings_dir: folder of shards with EVA embeddings to fit on; photos that its manifest
            holds out are left to ``evaluate``.
        evaluations: calls of the network, one solver for each number.
        conditions: samples to fit on and to measure with; a quarter is held out.
        guidance_scale: weight of the condition over the empty condition; 1: no guidance.
        seed: decides the samples and their noise.
        num_attention_heads, num_key_value_heads: needed for a .pt file without its configuration.
        dtype: element type of weights and activations; None: as stored.
        device: device to run on; auto: cuda if there is a GPU.
        progress: show a bar.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    model_path: str
    embeddings_dir: str
    evaluations: tuple[Count, ...] = (3, 5, 8, 12)
    conditions: Count = 16
    guidance_scale: float = 1.0
    seed: int = 0
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    dtype: DtypeName | None = None
    device: DeviceName = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        check(self, error=OptionError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fit-solver``."""
    add_flags(parser, FitOptions)
