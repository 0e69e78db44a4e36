"""``blip3o-fast extract``: images to shards of paired embeddings.

    torchrun --nproc_per_node 8 -m blip3o_fast extract --webdataset 'photos/*.tar' --output_dir out

Run again with the same options, it continues where it stopped. Images that cannot be read are
listed in ``skipped.jsonl`` beside the shards. Under torchrun processes share the images, one GPU
each; their number may change from run to run. Without torchrun, ``RANK`` and ``WORLD_SIZE`` in the
environment do the same for processes on several machines that see one file system with locks.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from blip3o_fast.data.manifest import Split
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.extraction.encoders import (
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
from blip3o_fast.flags import given
from blip3o_fast.hub import PREFIX, typed
from blip3o_fast.options.extract import ExtractOptions
from blip3o_fast.processes import Place, find_place
from blip3o_fast.signals import STOPPED, StopSignals
from blip3o_fast.untrusted import one_line

_SHOWN = 5
DEFAULT_PAIR_GB = 35
"""8.1 and 0.43 thousand million parameters of both models, stored in fp32."""


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
    folder, settings = options.output_dir, settings_of(options)
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


def settings_of(options: ExtractOptions) -> ExtractionSettings:
    """How images become samples."""
    return ExtractionSettings(
        include_cls=options.include_cls,
        dtype=options.store_dtype,
        samples_per_shard=options.samples_per_shard,
        batch_size=options.batch_size,
        workers=options.num_workers,
        max_samples=options.max_samples,
        seed=options.seed,
        mirror=options.mirror,
        split=Split(options.heldout_fraction),
    )


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
