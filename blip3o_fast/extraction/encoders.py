"""Towers: pretrained encoders behind one small interface, in the pairs that extraction runs.

    pair        eva side                       clip side                      tokens
    clip+eva    EVA-CLIP-8B, width 4096        CLIP ViT-L/14, width 1024      CLS + 16 x 16
    lite        EfficientNet-Lite2, width 120  EfficientNet-Lite0, width 112  16 x 16

Both published towers read the pixels of CLIP's image processor, as for the published features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.data.manifest import Encoder
from blip3o_fast.extraction.clip import CLIPVisionTower
from blip3o_fast.extraction.efficientnet import STRIDE, VARIANTS, load_efficientnet
from blip3o_fast.extraction.eva import EVAVisionTower
from blip3o_fast.hub import CLIP_REPOSITORY, EVA_REPOSITORY, PREFIX
from blip3o_fast.words import PairName

EVA_REVISION = "0e4dca944e8ece27eb9dfe4a488c0ed0c4644fc9"
CLIP_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
LITE_SIDE = 256
"""Pixels of the lite towers' image: 16 x 16 tokens of stride 16."""

_BEFORE_NORM = "last hidden state, before post_layernorm"


class Preprocessing(NamedTuple):
    """From an RGB image to a tower's input.

    Attributes:
        size: side S in pixels, of the bicubic resize's short side and of the centre crop.
        mean, std: per channel, for values 0 to 255: ``(x - mean) / std``.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return (
            f"RGB, bicubic to short side {self.size} (Pillow), centre crop {self.size}, "
            f"(x - [{mean}]) / [{std}] of 0..255"
        )

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 ``[B, 3, S, S]`` to what the tower reads, on the device of ``pixels``."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return ((pixels.float() - mean) / std).to(dtype)


CLIP_PREPROCESSING = Preprocessing(
    224,
    (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255),
    (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255),
)
LITE_PREPROCESSING = Preprocessing(LITE_SIDE, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))


class Tower(NamedTuple):
    """A loaded encoder and what a manifest says about it.

    Attributes:
        name, revision: model and version of its weights.
        layer: which hidden state ``forward`` returns.
        preprocessing: of its input.
        width: W of a token.
        grid: patches down and across, row-major.
        has_cls: whether token 0 is a CLS token.
        forward: normalised pixels ``[B, 3, S, S] -> [B, N, W]``.
        device, dtype: of its weights.
    """

    name: str
    revision: str
    layer: str
    preprocessing: Preprocessing
    width: int
    grid: tuple[int, int]
    has_cls: bool
    forward: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """Tokens N, CLS included."""
        return self.grid[0] * self.grid[1] + self.has_cls

    def origin(self) -> Encoder:
        """What the manifest records of this tower."""
        return Encoder(self.name, self.revision, self.layer, str(self.preprocessing))

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Raw pixels, uint8 ``[B, 3, S, S]`` on any device, to tokens ``[B, N, W]`` on the tower's.

        Raises:
            ValueError: when the pixels have another shape or are not uint8.
        """
        side = self.preprocessing.size
        check_shape("pixels", pixels, "B c h w", c=3, h=side, w=side)
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels: expected uint8, 0 to 255, got {pixels.dtype}")
        pixels = pixels.to(self.device, non_blocking=True)
        return self.forward(self.preprocessing.normalise(pixels, self.dtype))


class TowerPair(NamedTuple):
    """The condition's tower and the target's, with the same tokens."""

    eva: Tower
    clip: Tower


def lite_tower(
    variant: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tower:
    """EfficientNet ``lite0`` or ``lite2`` at 256 pixels, from its installed package.

    Raises:
        ImportError: when the package is absent, naming the extra.
    """
    net = load_efficientnet(variant).to(device=torch.device(device), dtype=dtype)
    return Tower(
        name=VARIANTS[variant].package,
        revision=VARIANTS[variant].file.rpartition("-")[2].removesuffix(".pth"),
        layer="last map of stride 16",
        preprocessing=LITE_PREPROCESSING,
        width=net.width,
        grid=(LITE_SIDE // STRIDE, LITE_SIDE // STRIDE),
        has_cls=False,
        forward=net.tokens,
        device=torch.device(device),
        dtype=dtype,
    )


def eva_tower(
    path_or_hub_id: str | Path = EVA_REPOSITORY,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tower:
    """EVA-CLIP's vision tower; see ``EVAVisionTower.from_pretrained``.

    Args:
        path_or_hub_id: a folder or a hub id.
        revision: of the hub repository; None is a pinned commit for the default repository.
        device, dtype: of the tower; dtype None is fp16 on a GPU and fp32 elsewhere.
    """
    revision = revision or (EVA_REVISION if _is(path_or_hub_id, EVA_REPOSITORY) else None)
    dtype = dtype or default_dtype(device)
    net = EVAVisionTower.from_pretrained(
        path_or_hub_id, revision=revision, dtype=dtype, device=device
    )
    return wrap_eva(net, _model_name(path_or_hub_id))


def wrap_eva(net: EVAVisionTower, name: str) -> Tower:
    """An EVA tower that is in memory, as a ``Tower``."""
    weight = net.embeddings.class_embedding
    return Tower(
        name=name,
        revision=net.revision,
        layer=_BEFORE_NORM,
        preprocessing=CLIP_PREPROCESSING._replace(size=net.config.image_size),
        width=net.config.hidden_size,
        grid=net.config.grid,
        has_cls=True,
        forward=net,
        device=weight.device,
        dtype=weight.dtype,
    )


def clip_tower(
    path_or_hub_id: str | Path = CLIP_REPOSITORY,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tower:
    """CLIP's vision tower; arguments as for ``eva_tower``, errors as for ``CLIPVisionTower``."""
    revision = revision or (CLIP_REVISION if _is(path_or_hub_id, CLIP_REPOSITORY) else None)
    dtype = dtype or default_dtype(device)
    net = CLIPVisionTower.from_pretrained(
        path_or_hub_id, revision=revision, dtype=dtype, device=device
    )
    return Tower(
        name=_model_name(path_or_hub_id),
        revision=net.revision,
        layer=_BEFORE_NORM,
        preprocessing=CLIP_PREPROCESSING._replace(size=net.image_size),
        width=net.width,
        grid=net.grid,
        has_cls=True,
        forward=net,
        device=torch.device(device),
        dtype=dtype,
    )


def load_towers(
    pair: PairName,
    *,
    eva_path: str | Path = EVA_REPOSITORY,
    clip_path: str | Path = CLIP_REPOSITORY,
    eva_revision: str | None = None,
    clip_revision: str | None = None,
    device: torch.device | str = "cpu",
    clip_device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TowerPair:
    """Load both towers of a pair; the paths and revisions concern ``clip+eva`` only.

    Args:
        pair: ``clip+eva`` or ``lite``.
        eva_path, clip_path: folders or hub ids.
        eva_revision, clip_revision: of the hub repositories.
        device: of both towers.
        clip_device: of the CLIP side, where it is another.
        dtype: of both towers; None is fp32 for ``lite`` and on a CPU, and fp16 otherwise.

    Raises:
        ImportError: when a package is absent, naming the extra.
        FileNotFoundError: when weights are missing.
        ValueError: when weights do not fit, or the towers' grids differ.
    """
    other = device if clip_device is None else clip_device
    if pair == "lite":
        precision = dtype or torch.float32
        eva = lite_tower("lite2", device=device, dtype=precision)
        return TowerPair(eva, lite_tower("lite0", device=other, dtype=precision))
    if pair != "clip+eva":
        raise ValueError(f"towers: expected clip+eva or lite, got {pair!r}")
    # The small one first, so that its errors show before the large one is read.
    clip = clip_tower(clip_path, revision=clip_revision, device=other, dtype=dtype)
    eva = eva_tower(eva_path, revision=eva_revision, device=device, dtype=dtype)
    if eva.grid != clip.grid:
        raise ValueError(f"towers: expected one grid, got {eva.grid} (EVA) and {clip.grid} (CLIP)")
    return TowerPair(eva, clip)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """fp16 on a GPU, as the published features were made, and fp32 on a CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def _is(path_or_hub_id: str | Path, repository: str) -> bool:
    """Whether a repository is meant, with its prefix or bare."""
    return path_or_hub_id in (repository, repository.removeprefix(PREFIX))


def _model_name(path_or_hub_id: str | Path) -> str:
    path = Path(path_or_hub_id)
    return path.resolve().name if path.is_dir() else str(path_or_hub_id).removeprefix(PREFIX)
