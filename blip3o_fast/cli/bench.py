"""``blip3o-fast bench``: times beside their limits, and beside other implementations.

Prints tables, and writes ``bench.json`` and pictures to the output folder. The record is written
after every case, so a run that is stopped loses at most one. Exits with 1 if something failed, if
the run was stopped, or if with ``--compare`` this library is slower than in an earlier run by more
than noise.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blip3o_fast.devices import find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import given
from blip3o_fast.options.bench import BenchOptions

if TYPE_CHECKING:
    from blip3o_fast.benchmarking.record import Record
    from blip3o_fast.benchmarking.selection import Settings

RECORD_NAME = "bench.json"


def run(args: argparse.Namespace) -> int:
    """Measure, write, print; 1 on a failure or a regression."""
    from blip3o_fast.benchmarking.compare import compare
    from blip3o_fast.benchmarking.record_plots import draw_plots
    from blip3o_fast.benchmarking.record_text import render_comparison, render_record
    from blip3o_fast.benchmarking.suite import run_suite
    from blip3o_fast.report.style import require_plots

    options = BenchOptions(**given(BenchOptions, args))
    settings = settings_of(options)
    if options.plots:
        require_plots()
    earlier = None if options.compare is None else read_earlier(options.compare, settings.device)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    record = run_suite(
        settings,
        progress=lambda name: print(name, file=sys.stderr, flush=True),
        save=lambda record: record.write(folder / RECORD_NAME),
    )
    record.write(folder / RECORD_NAME)
    print(render_record(record))
    if options.plots and record.measurements:
        for name, data in draw_plots(record).items():
            (folder / name).write_bytes(data)
    print(f"\nRecord: {folder / RECORD_NAME}")
    failed = bool(record.failures)
    if earlier is not None:
        comparison = compare(earlier, record)
        print(render_comparison(comparison))
        failed |= bool(comparison.regressions)
    return int(failed)


def settings_of(options: BenchOptions) -> "Settings":
    """What to measure.

    Raises:
        OptionError: for a group, a device or a checkout that there is not.
    """
    from blip3o_fast.benchmarking.checkout import check_checkout
    from blip3o_fast.benchmarking.selection import GROUPS, Settings

    for group in options.groups or ():
        if group not in GROUPS:
            raise OptionError(f"groups: expected some of {', '.join(GROUPS)}, got {group!r}")
    published = None if options.published is None else Path(options.published)
    if published is not None:
        check_checkout(published)
    return Settings(
        device=find_device(options.device),
        quick=options.quick,
        groups=tuple(g for g in GROUPS if options.groups is None or g in options.groups),
        published=published,
        seconds=options.seconds,
    )


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
