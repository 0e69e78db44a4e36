"""``blip3o-fast demo``: real photos to a trained translator and an honest report, on any machine.

Photos -> tokens of two small pretrained encoders -> shards -> a small DiT learns to translate one
encoder's tokens into the other's -> solvers are fitted to it -> held-out photos are translated ->
the result stands beside the mean predictor and a tuned ridge regression. Every stage continues
where an interrupted run stopped.
"""

import argparse
import sys
import time
from pathlib import Path

from blip3o_fast.demo.pipeline import (
    evaluate,
    extract_tokens,
    find_photos,
    fit_solvers_to,
    train_model,
)
from blip3o_fast.devices import find_device
from blip3o_fast.evaluation import require_plots, terminal_table, write_report
from blip3o_fast.flags import given
from blip3o_fast.options.demo import DemoOptions
from blip3o_fast.quantities import duration
from blip3o_fast.training import TrainingInterrupted


def run(args: argparse.Namespace) -> int:
    """Extract, train, evaluate; print the table and where the report is."""
    options = DemoOptions(**given(DemoOptions, args))
    device = find_device(options.device)
    folder = Path(options.output_dir)
    started = time.monotonic()

    # First: the extra that has photos brings what draws plots too.
    refs = find_photos(options)
    if options.plots:
        require_plots()
    samples, photos = extract_tokens(refs, folder / "shards", device, options.progress)
    say(
        started, f"{samples} crops of {len(refs)} photos, {photos} held out, in {folder / 'shards'}"
    )
    try:
        losses = train_model(options, folder, device)
    except TrainingInterrupted as stop:
        print(f"blip3o-fast demo: {stop}; run again to go on", file=sys.stderr)
        return stop.exit_status
    say(started, f"trained for {options.steps} steps, in {folder / 'run'}")
    fitted = fit_solvers_to(folder / "run", folder / "shards", device)
    errors = ", ".join(f"{n}: {solver.error:.2g}" for n, solver in sorted(fitted.items()))
    say(started, f"fitted solvers; error by number of evaluations {errors}")
    report = evaluate(options, folder, device, refs, losses)
    page = write_report(report, folder / "report", plots=options.plots)
    say(started, "evaluated on photos that training never saw")
    print()
    print(terminal_table(report))
    print(f"\nReport: {page}")
    return 0


def say(started: float, text: str) -> None:
    """One line of progress with the time so far."""
    print(f"[{duration(time.monotonic() - started)}] {text}", flush=True)
