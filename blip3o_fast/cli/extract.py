"""``blip3o-fast extract``: images to shards of paired embeddings.

Run again with the same options, it goes on where it stopped. Images that cannot be read are listed
in ``skipped.jsonl`` beside the shards.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from blip3o_fast.cli.switch import add_switch
from blip3o_fast.data.manifest import Split
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.extraction.encoders import (
    CLIP_REPOSITORY,
    EVA_REPOSITORY,
    TowerPair,
    load_towers,
)
from blip3o_fast.extraction.extract import (
    SKIPPED_FILE,
    ExtractionReport,
    Settings,
    Stopped,
    extract,
)
from blip3o_fast.extraction.sources import (
    ImageRef,
    coco_images,
    folder_images,
    webdataset_images,
)
from blip3o_fast.signals import STOPPED, StopSignals

_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``extract``."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--images", metavar="FOLDER", help="image files below a folder; x.txt is x.jpg's caption"
    )
    source.add_argument(
        "--webdataset", metavar="PATTERN", help="tars: a path, a glob or {00000..00031}.tar"
    )
    source.add_argument(
        "--coco", metavar="ROOT", help="MS-COCO: annotations/captions_SPLIT.json and its images"
    )
    add("--coco_split", default="val2017", metavar="SPLIT", help="part of COCO")
    add("--output_dir", required=True, metavar="DIR", help="folder for the shards")
    add(
        "--towers",
        default="clip+eva",
        choices=("clip+eva", "lite"),
        help="CLIP ViT-L/14 and EVA-CLIP-8B, or two small EfficientNets that need no download",
    )
    _add_tower_arguments(parser)
    _add_sample_arguments(parser)
    add("--batch_size", type=int, default=16, help="images a forward pass")
    add("--num_workers", type=int, default=2, help="threads that decode images")
    add_switch(parser, "resume", default=True, text="go on in a folder that holds such shards")
    add_switch(parser, "progress", default=True, text="show a bar of images")


def _add_tower_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--eva_path", default=EVA_REPOSITORY, help="folder or hub id of EVA-CLIP (clip+eva)")
    add("--clip_path", default=CLIP_REPOSITORY, help="folder or hub id of CLIP (clip+eva)")
    add("--eva_revision", help="commit, tag or branch of eva_path; None: a pinned commit")
    add("--clip_revision", help="commit, tag or branch of clip_path; None: a pinned commit")
    add("--device", default="auto", help="of both towers: auto, cpu, cuda or cuda:N")
    add("--clip_device", help="of the CLIP side; None: as device")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16", "float32"),
        help="the towers compute in; auto: float16 on a GPU for clip+eva, else float32",
    )


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_switch(parser, "include_cls", default=False, text="keep token 0, the CLS token: 257 tokens")
    add("--store_dtype", default="fp16", choices=tuple(DTYPES), help="element type of the shards")
    add("--samples_per_shard", type=int, default=256, help="rows of a full shard")
    add("--max_samples", type=int, help="stop when the folder holds so many samples; None: all")
    add("--crops", type=int, default=0, help="random square crops an image; 0: the whole image")
    add_switch(parser, "mirror", default=False, text="take each random crop mirrored as well")
    add("--seed", type=int, default=0, help="of the random crops")
    add(
        "--heldout_fraction",
        type=float,
        default=0.1,
        help="share of the photos, 0 to 1, that the manifest holds out of training",
    )


def run(args: argparse.Namespace) -> int:
    """Extract; 0 when done, 143 when stopped by SIGTERM after finishing the shard in progress.

    Raises:
        OptionError: on a number out of range, or a device that is absent.
        FileNotFoundError: when images or weights are missing.
        ImportError: when a package is absent, naming the extra.
        ValueError: when weights do not fit, or the folder holds other shards.
    """
    settings = _settings(args)
    images = _images(args)
    towers = _towers(args)
    try:
        with StopSignals("SIGTERM") as signals:
            report = extract(
                images,
                towers,
                args.output_dir,
                settings,
                resume=args.resume,
                progress=args.progress,
                stop=signals.asked,
            )
    except Stopped as stopped:
        print(f"blip3o-fast extract: {stopped}; run again to go on", file=sys.stderr)
        return STOPPED
    _tell(report, Path(args.output_dir))
    # Asked during the last batch, all is done; what called this should still not go on.
    return STOPPED if signals.asked() else 0


def _settings(args: argparse.Namespace) -> Settings:
    least = {"batch_size": 1, "num_workers": 1, "samples_per_shard": 1, "crops": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            raise OptionError(f"{name}: expected at least {low}, got {getattr(args, name)}")
    if args.max_samples is not None and args.max_samples < 1:
        raise OptionError(f"max_samples: expected at least 1, got {args.max_samples}")
    if not 0 <= args.heldout_fraction < 1:
        raise OptionError(
            f"heldout_fraction: expected 0 or more and below 1, got {args.heldout_fraction}"
        )
    if args.mirror and not args.crops:
        raise OptionError("mirror: expected crops of 1 or more beside it, got 0")
    return Settings(
        include_cls=args.include_cls,
        dtype=args.store_dtype,
        samples_per_shard=args.samples_per_shard,
        batch_size=args.batch_size,
        workers=args.num_workers,
        max_samples=args.max_samples,
        seed=args.seed,
        mirror=args.mirror,
        split=Split(args.heldout_fraction),
    )


def _images(args: argparse.Namespace) -> Iterable[ImageRef]:
    if args.webdataset is not None:
        refs = webdataset_images(args.webdataset)
        return (ref._replace(crops=args.crops) for ref in refs) if args.crops else refs
    if args.coco is not None:
        listed = coco_images(args.coco, args.coco_split)
    else:
        listed = folder_images(args.images)
    return [ref._replace(crops=args.crops) for ref in listed]


def _towers(args: argparse.Namespace) -> TowerPair:
    return load_towers(
        args.towers,
        eva_path=args.eva_path,
        clip_path=args.clip_path,
        eva_revision=args.eva_revision,
        clip_revision=args.clip_revision,
        device=find_device(args.device),
        clip_device=find_device(args.clip_device or args.device, "clip_device"),
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
    )


def _tell(report: ExtractionReport, folder: Path) -> None:
    print(f"{report.samples} samples in {folder}, {report.added} of them new")
    for item in report.skipped[:_SHOWN]:
        print(f"skipped {item.key}: {item.reason}", file=sys.stderr)
    if report.skipped:
        listed = folder / SKIPPED_FILE
        print(f"{len(report.skipped)} images skipped, listed in {listed}", file=sys.stderr)
