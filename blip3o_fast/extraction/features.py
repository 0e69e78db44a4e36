"""Features of images in memory, without shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.devices import find_device
from blip3o_fast.extraction.encoders import Tower, eva_tower, wrap_eva
from blip3o_fast.extraction.eva import EVAVisionTower
from blip3o_fast.extraction.images import UnreadableImage, load_rgb, to_pixels, to_rgb
from blip3o_fast.hub import EVA_REPOSITORY

if TYPE_CHECKING:
    from PIL.Image import Image


def extract_eva_features(
    images: "Sequence[Image | str | Path] | Image | str | Path | Tensor",
    tower: EVAVisionTower | Tower | None = None,
    *,
    path: str | Path = EVA_REPOSITORY,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    include_cls: bool = True,
    batch_size: int = 16,
) -> Tensor:
    """EVA features of images, ready for ``generate(eva_features=...)``.

    Args:
        images: Pillow images or paths, or one of either; or a tensor ``[B, 3, S, S]``: uint8 for
            raw pixels 0 to 255, floating point for pixels that CLIP's processor has normalised.
        tower: a loaded tower, for more than one call. None loads ``path`` at every call.
        path, revision: of EVA-CLIP-8B, a folder or a hub id; without ``tower`` only.
        device: None is the GPU if there is one; without ``tower`` only.
        dtype: None is fp16 on a GPU and fp32 on a CPU; without ``tower`` only.
        include_cls: keep token 0, the CLS token.
        batch_size: images per forward pass.

    Returns:
        fp32 ``[B, 257, 4096]``, or ``[B, 256, 4096]`` without CLS, on the tower's device: last
        hidden state before ``post_layernorm``, patches row-major.

    Raises:
        ValueError: when a tensor has another shape, an image cannot be read (naming it), or there
            is none.
    """
    if tower is None:
        _check_files(images)  # before gigabytes of weights are downloaded
        where = find_device("auto") if device is None else device
        tower = eva_tower(path, revision=revision, device=where, dtype=dtype)
    if isinstance(tower, EVAVisionTower):
        tower = wrap_eva(tower, "EVA-CLIP")
    return extract_features(images, tower, include_cls=include_cls, batch_size=batch_size)


def extract_features(
    images: "Sequence[Image | str | Path] | Image | str | Path | Tensor",
    tower: Tower,
    *,
    include_cls: bool = True,
    batch_size: int = 16,
) -> Tensor:
    """Features of images by any tower, fp32 ``[B, N, W]``; see ``extract_eva_features``."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    several = _several(images)
    if len(several) == 0:
        raise ValueError("images: expected at least one, got none")
    parts = []
    for start in range(0, len(several), batch_size):
        tokens = _encode(several[start : start + batch_size], start, tower)
        parts.append(tokens[:, 1:] if tower.has_cls and not include_cls else tokens)
    return torch.cat(parts).float()


def _several(
    images: "Sequence[Image | str | Path] | Image | str | Path | Tensor",
) -> "Sequence[Image | str | Path] | Tensor":
    if isinstance(images, Tensor):
        return images
    if isinstance(images, Sequence) and not isinstance(images, str):
        return images
    return [images]


def _check_files(images: "Sequence[Image | str | Path] | Image | str | Path | Tensor") -> None:
    if isinstance(images, Tensor):
        return
    for index, image in enumerate(_several(images)):
        if isinstance(image, (str, Path)) and not Path(image).is_file():
            raise ValueError(f"images[{index}] ({image}): expected an image file, found none")


@torch.inference_mode()
def _encode(images: "Sequence[Image | str | Path] | Tensor", start: int, tower: Tower) -> Tensor:
    side = tower.preprocessing.size
    if not isinstance(images, Tensor):
        return tower.encode(
            torch.stack([_pixels(i, start + n, side) for n, i in enumerate(images)])
        )
    if images.dtype == torch.uint8:
        return tower.encode(images)
    check_shape("images", images, "B c h w", c=3, h=side, w=side)
    if not images.is_floating_point():
        raise ValueError(f"images: expected uint8 or floating point, got {images.dtype}")
    return tower.forward(images.to(tower.device, tower.dtype))


def _pixels(image: "Image | str | Path", index: int, side: int) -> Tensor:
    try:
        if isinstance(image, (str, Path)):
            return to_pixels(load_rgb(Path(image)), side)
        return to_pixels(to_rgb(image), side)
    except UnreadableImage as error:
        name = image if isinstance(image, (str, Path)) else f"mode {image.mode}"
        raise ValueError(f"images[{index}] ({name}): {error}") from None
