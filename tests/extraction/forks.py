"""Extractions by several processes: ``python -m tests.extraction.forks IMAGES OUT ROUNDS SEED``.

The parent imports torch once and does no work with it, so forking is cheap and safe. Some of the
children are killed at a random moment with SIGKILL, which no handler sees.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from blip3o_fast.extraction.encoders import TowerPair
from blip3o_fast.extraction.extract import ExtractionSettings, extract, extract_share
from blip3o_fast.extraction.image_sources import folder_images, webdataset_tars
from blip3o_fast.extraction.lots import Images
from tests.extraction.conftest import mean_colour_tower, patch_means

SETTINGS = ExtractionSettings(samples_per_shard=5, batch_size=2, mirror=True, workers=1)
PAUSE = 0.004  # seconds that a batch takes


def images_of(folder: Path) -> Images:
    """The tars of a folder if it has any, else its images."""
    if any(folder.glob("*.tar")):
        return [replace(tar, crops=2) for tar in webdataset_tars(f"{folder}/*.tar")]
    return [ref._replace(crops=2) for ref in folder_images(folder)]


def towers() -> TowerPair:
    """Products with a matrix, whose last bits may depend on how many samples are in a batch."""
    weight = torch.linspace(-1, 1, 3 * 7).view(3, 7)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return patch_means(pixels) @ weight

    eva = mean_colour_tower("colour", False, forward)._replace(width=7)
    return TowerPair(eva, mean_colour_tower("red", False, lambda x: patch_means(x)[..., :1]))


def start(work: Callable[[], object]) -> int:
    """A child that does some work; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int | None:
    """The child's exit status, once it ends; None if it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """Print how many processes were killed; every data set must be the same in the end."""
    images, folder, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    moments = random.Random(int(sys.argv[4]))

    def share(out: Path) -> None:
        extract_share(images_of(images), towers(), out, SETTINGS)

    def alone(out: Path) -> None:
        extract(images_of(images), towers(), out, SETTINGS, resume=True)

    def kill(children: list[int], at_work: int) -> int:
        time.sleep(moments.uniform(0, 0.8 * duration / at_work))
        for child in children:
            os.kill(child, signal.SIGKILL)
        statuses = [ended(child) for child in children]
        assert set(statuses) <= {None, 0}
        return statuses.count(None)

    duration = 0.0
    for name in ("warm", "whole"):  # the first run also waits for files that are read once
        started = time.monotonic()
        assert ended(start(partial(alone, folder / name))) == 0
        duration = time.monotonic() - started
    whole = contents(folder / "whole")
    killed = 0

    def require_whole(out: Path) -> None:
        found = contents(out)
        differing = {name for name in {*found, *whole} if found.get(name) != whole.get(name)}
        assert not differing, (out, differing)

    for i in range(rounds):
        out = folder / f"one of two {i}"
        first, other = (start(partial(share, out)) for _ in range(2))
        killed += kill([first], 2)
        assert ended(other) == 0
        if (out / ".claims").exists():  # it was killed when the other one had left
            assert ended(start(partial(share, out))) == 0
        require_whole(out)

        out = folder / f"changing {i}"
        killed += kill([start(partial(alone, out))], 1)
        for count in (2, 3):
            killed += kill([start(partial(share, out)) for _ in range(count)], count)
        assert ended(start(partial(alone, out))) == 0
        require_whole(out)
        shutil.rmtree(out)

    out = folder / "three"
    assert [ended(child) for child in [start(partial(share, out)) for _ in range(3)]] == [0, 0, 0]
    require_whole(out)
    print(killed)  # noqa: T201


if __name__ == "__main__":
    main()
