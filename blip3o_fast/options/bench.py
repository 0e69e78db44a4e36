"""What ``blip3o-fast bench`` takes."""

import argparse
from dataclasses import dataclass

from blip3o_fast.checked import Positive, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import add_flags
from blip3o_fast.words import DeviceName


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``bench``.

    Attributes:
        quick: few samples and no compilation: under 2 minutes on two cores.
        output_dir: folder for bench.json and the pictures.
        compare: bench.json of an earlier run on the same device.
        groups: of ops, attention, block, evaluation, generate, training, loader; None: all.
        published: checkout of the published implementation, to be timed too.
        device: device to run on; auto: cuda if there is a GPU.
        seconds: of measurement for a task.
        plots: draw the pictures (needs matplotlib).

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    quick: bool = False
    output_dir: str = "bench"
    compare: str | None = None
    groups: tuple[str, ...] | None = None
    published: str | None = None
    device: DeviceName = "auto"
    seconds: Positive = 2.0
    plots: bool = True

    def __post_init__(self) -> None:
        check(self, error=OptionError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    add_flags(parser, BenchOptions)
