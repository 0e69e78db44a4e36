"""``blip3o-fast convert``: published pickles and other formats to shards, once and for all.

Pickles are interpreted by a reader that knows data only; nothing in them is run. A conversion that
was interrupted goes on when the same command is given again. At the end every shard's checksum is
verified and sampled rows are compared bit by bit with the source.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from blip3o_fast.cli.switch import add_switch
from blip3o_fast.data.conversion import (
    Outcome,
    fp16_is_exact,
    verify_conversion,
    write_planned,
)
from blip3o_fast.data.planning import Plan, Wishes, open_sources, plan_conversion
from blip3o_fast.devices import DTYPES
from blip3o_fast.errors import OptionError

_GIB = 1 << 30
_REMARKS_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``convert``."""
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="a published pickle, a tar of arrays, or a folder: of published shards or COCO files "
        "(*.pkl), of tars (KEY.eva.npy, KEY.clip.npy, KEY.txt), or with eva.npy and clip.npy",
    )
    add("dest", type=Path, help="folder for the shards; one left unfinished is continued")
    add_switch(parser, "dry_run", default=False, text="show what would be written, and stop")
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="element type of the shards; None: the source's, so that nothing is lost",
    )
    add("--samples_per_shard", type=int, default=256, help="rows of a full shard")
    add(
        "--tokens",
        type=int,
        help="tokens a sample: one less than the source's drops CLS, one more puts the mean of the "
        "tokens in its place; None: as they are",
    )
    add(
        "--grid",
        type=int,
        nargs=3,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="patches along each axis; None: a square",
    )
    add(
        "--training_mode",
        choices=("patch_only", "cls_patch"),
        help="which of a folder's published shards to take; None: those that are there",
    )
    add("--max_shards", type=int, help="take the first so many files; None: all")
    add(
        "--heldout_fraction",
        type=float,
        default=0.1,
        help="share of the photos, 0 to 1, that the manifest holds out of training",
    )
    add("--eva_encoder", help="name of the EVA tower; None: as the source says")
    add("--clip_encoder", help="name of the CLIP tower; None: as the source says")
    add_switch(
        parser, "skip_bad_rows", default=False, text="leave out rows with NaN or Inf, and list them"
    )
    add("--verify_rows", type=int, default=64, help="rows compared with the source afterwards")


def run(args: argparse.Namespace) -> int:
    """Convert and verify; 0 when every checksum and sampled row agrees.

    Raises:
        OptionError: for a number out of range.
        FileNotFoundError: if the source is missing or holds nothing to convert.
        ValueError: naming the file, the row or the shard at fault.
    """
    _check(args)
    sources = open_sources(args.source, args.training_mode, args.max_shards)
    wishes = Wishes(
        dtype=args.dtype,
        tokens=args.tokens,
        grid=None if args.grid is None else tuple(args.grid),
        heldout_fraction=args.heldout_fraction,
        eva_encoder=args.eva_encoder,
        clip_encoder=args.clip_encoder,
    )
    plan = plan_conversion(sources, wishes)
    _describe(plan, args.samples_per_shard)
    if args.dry_run:
        print("dry run: nothing was written")
        return 0
    # disable=None: no bar where there is no terminal.
    with tqdm(total=plan.count, desc="convert", unit="sample", disable=None) as bar:
        outcome = write_planned(
            plan,
            args.dest,
            samples_per_shard=args.samples_per_shard,
            skip_bad_rows=args.skip_bad_rows,
            progress=bar.update,
        )
    identical = verify_conversion(plan, args.dest, args.verify_rows)
    _conclude(args, outcome, identical)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("samples_per_shard", "max_shards", "tokens", "verify_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"{name}: expected at least 1, got {value}")
    if not 0 <= args.heldout_fraction < 1:
        raise OptionError(
            f"heldout_fraction: expected 0 or more and less than 1, got {args.heldout_fraction}"
        )
    if args.dest.is_file():
        raise OptionError(f"dest: expected a folder, got the file {args.dest}")
    if args.source.resolve() == args.dest.resolve():
        raise OptionError(f"dest: expected another folder than the source, got {args.dest}")


def _describe(plan: Plan, samples_per_shard: int) -> None:
    facts = plan.facts
    print(
        f"{len(plan.sources)} files, {plan.count} samples of {facts.tokens} tokens "
        f"({'with' if facts.has_cls else 'without'} CLS, grid {facts.grid}), widths "
        f"{facts.eva_width} (eva) and {facts.clip_width} (clip)"
    )
    shards = -(-plan.count // samples_per_shard)
    print(
        f"{facts.dtype}: {plan.count * facts.sample_bytes / _GIB:.2f} GiB in {shards} shards of "
        f"{samples_per_shard}"
    )
    if facts.dtype == "fp32" and fp16_is_exact(plan):
        print("the rows looked at are fp16 values: --dtype fp16 would halve this and lose nothing")
    _list("remark", plan.remarks)


def _conclude(args: argparse.Namespace, outcome: Outcome, identical: list[str]) -> None:
    _list("left out", outcome.skipped)
    _list("remark", identical)
    done = f" ({outcome.done} were done before)" if outcome.done else ""
    print(
        f"{outcome.written} samples written{done}, {len(outcome.skipped)} left out; checksums and "
        f"up to {args.verify_rows} rows verified: {args.dest}"
    )


def _list(title: str, lines: "tuple[str, ...] | list[str]") -> None:
    for line in lines[:_REMARKS_SHOWN]:
        print(f"{title}: {line}")
    if len(lines) > _REMARKS_SHOWN:
        print(f"{title}: {len(lines) - _REMARKS_SHOWN} more; the manifest's notes have them all")
