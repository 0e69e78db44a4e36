"""Small towers whose tokens can be read: each is the mean colour of a patch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blip3o_fast.extraction.encoders import Preprocessing, Tower, TowerPair

SIDE, PATCH = 32, 8
RAW = Preprocessing(SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def patch_means(pixels: Tensor) -> Tensor:
    """``[B, 3, 32, 32]`` of 0 to 255 to ``[B, 16, 3]``, row-major."""
    return F.avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2)


def with_cls(tokens: Tensor) -> Tensor:
    """The mean of the tokens in front of them."""
    return torch.cat((tokens.mean(1, keepdim=True), tokens), dim=1)


def mean_colour_tower(name: str, has_cls: bool, forward: Callable[[Tensor], Tensor]) -> Tower:
    width = 3 if name == "colour" else 1
    cpu = torch.device("cpu")
    return Tower(name, "1", "mean", RAW, width, (4, 4), has_cls, forward, cpu, torch.float32)


@pytest.fixture
def towers() -> TowerPair:
    """Eva side: mean colours. Clip side: mean red, halved."""
    return TowerPair(
        mean_colour_tower("colour", True, lambda x: with_cls(patch_means(x))),
        mean_colour_tower("red", True, lambda x: with_cls(patch_means(x)[..., :1] / 2)),
    )


@pytest.fixture
def make_image() -> Callable[..., Image.Image]:
    """A smooth image of random colours, whose seed is its only secret."""

    def make(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
        noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def image_folder(tmp_path: Path, make_image: Callable[..., Image.Image]) -> Path:
    """Ten images in two folders; ``a/3.png`` has a caption."""
    root = tmp_path / "images"
    for n in range(10):
        path = root / ("a" if n < 5 else "b") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(n).save(path)
    (root / "a" / "3.txt").write_text("three\n", encoding="utf-8")
    return root
