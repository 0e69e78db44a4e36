"""``blip3o-fast bench``: times beside their limits, and beside other implementations.

Ends with tables, and ``bench.json`` and plots in the output folder; the record is written after
every case, so that a run that is stopped loses one at most. It exits with 1 if something failed or
the run was stopped, or with ``--compare`` if this library has become slower than an earlier run by
more than noise.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blip3o_fast.errors import OptionError
from blip3o_fast.flags import add_switch

if TYPE_CHECKING:
    from blip3o_fast.benchmarking.record import Record
    from blip3o_fast.benchmarking.selection import Settings

RECORD_NAME = "bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="few samples and no compilation: under 2 minutes on two cores",
    )
    add("--output_dir", default="bench", help="folder for bench.json and the plots")
    add("--compare", metavar="FILE", help="bench.json of an earlier run on the same device")
    add(
        "--groups",
        nargs="+",
        help="of ops, attention, block, evaluation, generate, training, loader; None: all",
    )
    add("--published", metavar="FOLDER", help="checkout of the published implementation, a peer")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device")
    add("--seconds", type=float, default=2.0, help="of measurement for a task")
    add_switch(parser, "plots", default=True, text="draw the pictures (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measure, write, print; 1 on a failure or a regression."""
    from blip3o_fast.benchmarking.compare import compare
    from blip3o_fast.benchmarking.record_plots import draw_plots
    from blip3o_fast.benchmarking.record_text import render_comparison, render_record
    from blip3o_fast.benchmarking.suite import run_suite
    from blip3o_fast.report.style import require_plots

    settings = read_settings(args)
    if args.plots:
        require_plots()
    earlier = None if args.compare is None else read_earlier(args.compare, settings.device)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = run_suite(
        settings,
        progress=lambda name: print(name, file=sys.stderr, flush=True),
        save=lambda record: record.write(folder / RECORD_NAME),
    )
    record.write(folder / RECORD_NAME)
    print(render_record(record))
    if args.plots and record.measurements:
        for name, data in draw_plots(record).items():
            (folder / name).write_bytes(data)
    print(f"\nRecord: {folder / RECORD_NAME}")
    failed = bool(record.failures)
    if earlier is not None:
        comparison = compare(earlier, record)
        print(render_comparison(comparison))
        failed |= bool(comparison.regressions)
    return int(failed)


def read_earlier(path: str, device: torch.device) -> "Record":
    """The record to compare with, read before the measurement.

    Raises:
        OptionError: if there is none at ``path``, or it is one of another device.
    """
    from blip3o_fast.benchmarking.compare import check_device
    from blip3o_fast.benchmarking.environment import device_name
    from blip3o_fast.benchmarking.record import read_record

    try:
        earlier = read_record(path)
        check_device(earlier, device_name(device))
    except (ValueError, OSError) as error:
        raise OptionError(str(error)) from None
    return earlier


def read_settings(args: argparse.Namespace) -> "Settings":
    """The settings that the options ask for.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """
    from blip3o_fast.benchmarking.checkout import check_checkout
    from blip3o_fast.benchmarking.selection import GROUPS, Settings

    for group in args.groups or ():
        if group not in GROUPS:
            raise OptionError(f"groups: expected some of {', '.join(GROUPS)}, got {group!r}")
    groups = tuple(group for group in GROUPS if args.groups is None or group in args.groups)
    if not 0 < args.seconds < math.inf:
        raise OptionError(f"seconds: expected a positive number, got {args.seconds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device: expected a GPU that torch can use for cuda, found none")
    published = None if args.published is None else Path(args.published)
    if published is not None:
        check_checkout(published)
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return Settings(
        device=torch.device(kind),
        quick=args.quick,
        groups=groups,
        published=published,
        seconds=args.seconds,
    )
