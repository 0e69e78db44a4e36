"""``blip3o-fast extract``: images to shards of paired embeddings.

    torchrun --nproc_per_node 8 -m blip3o_fast extract --webdataset 'photos/*.tar' --output_dir out

Run again with the same options, it continues where it stopped. Images that cannot be read are
listed in ``skipped.jsonl`` beside the shards. Under torchrun processes share the images, one GPU
each; their number may change from run to run. Without torchrun, ``RANK`` and ``WORLD_SIZE`` in the
environment do the same for processes on several machines that see one file system with locks.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from blip3o_fast.checked import Count, Index, Share, check
from blip3o_fast.data.manifest import Split
from blip3o_fast.devices import DTYPES, DtypeName, find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.extraction.encoders import (
    CLIP_REPOSITORY,
    EVA_REPOSITORY,
    PairName,
    TowerPair,
    load_towers,
)
from blip3o_fast.extraction.extract import (
    SKIPPED_FILE,
    Extracted,
    ExtractionSettings,
    Stopped,
    extract,
    extract_share,
)
from blip3o_fast.extraction.image_sources import coco_images, folder_images, webdataset_tars
from blip3o_fast.extraction.lots import Images
from blip3o_fast.flags import Flag, add_flags, given
from blip3o_fast.hub import PREFIX, typed
from blip3o_fast.processes import Place, find_place
from blip3o_fast.signals import STOPPED, StopSignals
from blip3o_fast.untrusted import one_line

_SHOWN = 5
DEFAULT_PAIR_GB = 35
"""8.1 and 0.43 thousand million parameters of both models, stored in fp32."""


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

    def settings(self) -> ExtractionSettings:
        """How images become samples."""
        return ExtractionSettings(
            include_cls=self.include_cls,
            dtype=self.store_dtype,
            samples_per_shard=self.samples_per_shard,
            batch_size=self.batch_size,
            workers=self.num_workers,
            max_samples=self.max_samples,
            seed=self.seed,
            mirror=self.mirror,
            split=Split(self.heldout_fraction),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``extract``."""
    add_flags(parser, ExtractOptions)


def run(args: argparse.Namespace) -> int:
    """Extract; 0 when done, 143 when stopped by SIGTERM.

    The shard in progress is finished then; one process of several drops it instead, so that the
    data set does not depend on when that was.

    Raises:
        OptionError: on a number out of range, or a device that is absent.
        FileNotFoundError: when images or weights are missing.
        ImportError: when a package is absent, naming the extra.
        ValueError: when weights do not fit, or the folder holds other shards.
    """
    options = ExtractOptions(**given(ExtractOptions, args))
    place = find_place() or Place(rank=0, size=1, local_rank=0)
    if place.size > 1:
        _check_shared(options)
    images = _images(options)
    towers = _towers(options, place)
    folder, settings = options.output_dir, options.settings()
    progress = options.progress and place.rank == 0
    try:
        with StopSignals("SIGTERM") as signals:
            if place.size > 1:
                stop = signals.asked
                report = extract_share(
                    images, towers, folder, settings, progress=progress, stop=stop
                )
            else:
                report = extract(
                    images,
                    towers,
                    folder,
                    settings,
                    resume=options.resume,
                    progress=progress,
                    stop=signals.asked,
                )
    except Stopped as stopped:
        print(f"blip3o-fast extract: {stopped}; run again to go on", file=sys.stderr)
        return STOPPED
    if report is not None:
        _tell(report, Path(options.output_dir))
    # A signal during the last batch still tells the caller to stop.
    return STOPPED if signals.asked() else 0


def _check_shared(options: ExtractOptions) -> None:
    """What several processes cannot do, refused before towers are loaded."""
    if options.max_samples is not None:
        raise OptionError("max_samples: expected a single process, got several")
    if not options.resume:
        raise OptionError("no_resume: expected a single process, got several")


def _images(options: ExtractOptions) -> Images:
    if options.webdataset is not None:
        tars = webdataset_tars(options.webdataset)
        return [replace(tar, crops=options.crops) for tar in tars]
    if options.coco is not None:
        listed = coco_images(options.coco, options.coco_split)
    else:
        assert options.images is not None
        listed = folder_images(options.images)
    return [ref._replace(crops=options.crops) for ref in listed]


def _announce_downloads(options: ExtractOptions) -> None:
    """Say what the default towers weigh before anything is fetched."""
    paths = (options.eva_path, options.clip_path)
    if options.towers == "clip+eva" and any(path.startswith(PREFIX) for path in paths):
        print(
            f"weights: {paths[0]} and {paths[1]}; the default pair is about {DEFAULT_PAIR_GB} GB, "
            "downloaded once. --eva_path and --clip_path take folders; --towers lite needs no "
            "download",
            file=sys.stderr,
        )


def _towers(options: ExtractOptions, place: Place) -> TowerPair:
    device = _own_device(options.device, "device", place)
    clip_device = _own_device(options.clip_device or options.device, "clip_device", place)
    if place.rank == 0:
        _announce_downloads(options)
    return load_towers(
        options.towers,
        eva_path=typed(options.eva_path),
        clip_path=typed(options.clip_path),
        eva_revision=options.eva_revision,
        clip_revision=options.clip_revision,
        device=device,
        clip_device=clip_device,
        dtype=None if options.dtype == "auto" else DTYPES[options.dtype],
    )


def _own_device(name: str, option: str, place: Place) -> torch.device:
    """The device of that name; of several GPUs, the one of this process."""
    device = find_device(name, option)
    if device.type == "cuda" and device.index is None and place.size > 1:
        return find_device(f"cuda:{place.local_rank}", option)
    return device


def _tell(report: Extracted, folder: Path) -> None:
    print(f"{report.samples} samples in {folder}, {report.added} of them new")
    for item in report.skipped[:_SHOWN]:
        print(one_line(f"skipped {item.key}: {item.reason}"), file=sys.stderr)
    if report.skipped:
        listed = folder / SKIPPED_FILE
        print(f"{len(report.skipped)} images skipped, listed in {listed}", file=sys.stderr)
