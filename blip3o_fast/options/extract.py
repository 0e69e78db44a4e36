"""What ``blip3o-fast extract`` takes."""

import argparse
from dataclasses import dataclass
from typing import Annotated, Literal

from blip3o_fast.checked import Count, Index, Share, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import Flag, add_flags
from blip3o_fast.hub import CLIP_REPOSITORY, EVA_REPOSITORY
from blip3o_fast.words import DtypeName, PairName


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Options of ``extract``.

    Attributes:
        images: image files below a folder; x.txt is x.jpg's caption.
        webdataset: tars of images, as a path, a glob or {00000..00031}.tar.
        coco: MS-COCO: annotations/captions_SPLIT.json and its images.
        coco_split: part of COCO.
        output_dir: folder for the shards.

    Attributes: Towers
        towers: CLIP ViT-L/14 and EVA-CLIP-8B, or two small EfficientNets that need no download.
        eva_path: folder of EVA-CLIP, or hf:owner/name on the hub (clip+eva).
        clip_path: folder of CLIP, or hf:owner/name on the hub (clip+eva).
        eva_revision: commit, tag or branch of eva_path; None: a pinned commit.
        clip_revision: commit, tag or branch of clip_path; None: a pinned commit.
        device: device of both towers: auto, cpu, cuda or cuda:N; under torchrun, auto and cuda are
            a GPU for each process.
        clip_device: device of the CLIP tower; None: as device.
        dtype: element type that the towers compute in; auto: fp16 on a GPU for clip+eva, else
            fp32.

    Attributes: Samples
        include_cls: keep token 0, the CLS token: 257 tokens.
        store_dtype: element type of the shards.
        samples_per_shard: rows of a full shard; a shard holds images of one tar only.
        max_samples: stop when the folder holds so many samples; None: all. A single process only.
        crops: random square crops per image; 0: the whole image.
        mirror: take each random crop mirrored as well.
        seed: decides the random crops.
        heldout_fraction: share of the photos, 0 to 1, that the manifest holds out of training.

    Attributes: Execution
        batch_size: images per forward pass.
        num_workers: threads that decode images.
        resume: continue a folder that holds shards of the same settings.
        progress: show a bar of images.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    images: Annotated[str | None, Flag("DIR", one_of="images")] = None
    webdataset: Annotated[str | None, Flag("PATTERN", one_of="images")] = None
    coco: Annotated[str | None, Flag("DIR", one_of="images")] = None
    coco_split: Annotated[str, Flag("SPLIT")] = "val2017"
    output_dir: Annotated[str, Flag("DIR")]
    towers: PairName = "clip+eva"
    eva_path: str = EVA_REPOSITORY
    clip_path: str = CLIP_REPOSITORY
    eva_revision: str | None = None
    clip_revision: str | None = None
    device: str = "auto"
    clip_device: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    include_cls: bool = False
    store_dtype: DtypeName = "fp16"
    samples_per_shard: Count = 256
    max_samples: Count | None = None
    crops: Index = 0
    mirror: bool = False
    seed: int = 0
    heldout_fraction: Share = 0.1
    batch_size: Count = 16
    num_workers: Count = 2
    resume: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        check(self, error=OptionError)
        if self.mirror and not self.crops:
            raise OptionError("mirror: expected crops of 1 or more beside it, got 0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``extract``."""
    add_flags(parser, ExtractOptions)
