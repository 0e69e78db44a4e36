"""What ``blip3o-fast demo`` takes."""

import argparse
from dataclasses import dataclass
from typing import Annotated

from blip3o_fast.checked import Count, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import Flag, add_flags
from blip3o_fast.words import DeviceName


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``demo``.

    Attributes:
        output_dir: folder for everything the demo makes.
        images: folder of your own images; None: photos of installed packages.
        max_images: use at most so many images; None: all.
        steps: optimizer steps of 16 samples.
        max_samples: held-out crops that are translated.
        evaluations: numbers of calls of the network to sample with.
        device: device to run on; auto: cuda if there is a GPU.
        plots: draw the pictures of the report (needs matplotlib).
        progress: show bars.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    output_dir: str = "demo"
    images: Annotated[str | None, Flag("DIR")] = None
    max_images: int | None = None
    steps: Count = 600
    max_samples: Count = 96
    evaluations: tuple[Count, ...] = (1, 2, 4, 10, 25, 50, 100)
    device: DeviceName = "auto"
    plots: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        check(self, error=OptionError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    add_flags(parser, DemoOptions)
