"""What ``blip3o-fast convert`` takes."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from blip3o_fast.checked import Count, Share, check
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import Flag, add_flags
from blip3o_fast.words import DtypeName


@dataclass(frozen=True)
class ConvertOptions:
    """Options of ``convert``.

    Attributes:
        source: a published pickle, a tar of arrays, or a folder: of published shards or COCO files
            (*.pkl), of tars (KEY.eva.npy, KEY.clip.npy, KEY.txt), or with eva.npy and clip.npy.
        dest: folder for the shards; one left unfinished is continued.
        dry_run: show what would be written, and stop.

    Attributes: Source
        training_mode: which of a folder's published shards to take; None: those that are there.
        max_shards: take the first so many files; None: all.
        skip_bad_rows: leave out rows with NaN or Inf, and list them.
        eva_encoder: name of the EVA tower; None: as the source says.
        clip_encoder: name of the CLIP tower; None: as the source says.

    Attributes: Shards
        dtype: element type of the shards; None: the source's, so that nothing is lost.
        samples_per_shard: rows of a full shard.
        tokens: tokens per sample; one less than the source's drops the CLS token, one more puts the
            mean of the tokens in its place; None: as they are.
        grid: patches along each axis; None: assume a square.
        heldout_fraction: share of the photos, 0 to 1, that the manifest holds out of training.
        verify_rows: rows compared with the source afterwards.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    source: Annotated[Path, Flag(positional=True)]
    dest: Annotated[Path, Flag(positional=True)]
    dry_run: bool = False
    dtype: DtypeName | None = None
    samples_per_shard: Count = 256
    tokens: Count | None = None
    grid: Annotated[tuple[int, int, int] | None, Flag(("DEPTH", "HEIGHT", "WIDTH"))] = None
    training_mode: Literal["patch_only", "cls_patch"] | None = None
    max_shards: Count | None = None
    heldout_fraction: Share = 0.1
    eva_encoder: str | None = None
    clip_encoder: str | None = None
    skip_bad_rows: bool = False
    verify_rows: Count = 64

    def __post_init__(self) -> None:
        check(self, error=OptionError)
        if self.dest.is_file():
            raise OptionError(f"dest: expected a folder, got the file {self.dest}")
        if self.source.resolve() == self.dest.resolve():
            raise OptionError(f"dest: expected another folder than the source, got {self.dest}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``convert``."""
    add_flags(parser, ConvertOptions)
