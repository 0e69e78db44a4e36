"""``blip3o-fast train``: one flag for every field of ``TrainingOptions``.

Values come from the defaults, then ``--config FILE`` (JSON or TOML), then the flags that were
typed. A stopped run continues when the same command is given again.
"""

import argparse
import json
import os
import sys

from blip3o_fast.flags import given
from blip3o_fast.options.train import TrainFlags, TrainingOptions, read_options_file
from blip3o_fast.processes import World
from blip3o_fast.quantities import count
from blip3o_fast.training import TrainingInterrupted, train
from blip3o_fast.training.run import prepare


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is complete, 143 when it stopped on a signal after saving."""
    flags = TrainFlags(**given(TrainFlags, args))
    values = read_options_file(flags.config) if flags.config else {}
    options = TrainingOptions.from_dict({**values, **given(TrainingOptions, args)})
    if flags.print_config:
        print(json.dumps(options.to_dict(), indent=2))
        return 0
    first = os.environ.get("RANK", "0") == "0"
    if flags.dry_run:
        plan = prepare(options, World()).describe()
        if first:
            print(json.dumps(plan, indent=2))
        return 0
    try:
        result = train(options)
    except TrainingInterrupted as stop:
        print(f"blip3o-fast train: {stop}", file=sys.stderr)
        return stop.exit_status
    if not first:
        return 0
    if result.before == result.steps:
        print(f"nothing to do: {result.folder} is complete after {count(result.steps, 'step')}")
    if result.best is not None:
        print(
            f"best validation: token cosine {result.best.token_cosine:.4f}, image cosine "
            f"{result.best.image_cosine:.4f} after step {result.best.step}; run in {result.folder}"
        )
    return 0
