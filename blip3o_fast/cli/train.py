"""``blip3o-fast train``: one flag for every field of ``TrainingOptions``.

Values come from the defaults, then ``--config FILE`` (JSON or TOML), then the flags that were
typed. A stopped run continues when the same command is given again.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import Annotated

from blip3o_fast.flags import Flag, add_flags, given
from blip3o_fast.processes import World
from blip3o_fast.quantities import count
from blip3o_fast.training import TrainingInterrupted, TrainingOptions, train
from blip3o_fast.training.options import read_options_file
from blip3o_fast.training.run import prepare

_LAUNCH = (
    "torchrun starts the processes and tells them: torchrun --nproc_per_node N -m blip3o_fast "
    "train; batch_size counts the samples of all of them"
)
_FOLDER = "checkpoints go to --output_dir alone"
ANSWERS = {
    **dict.fromkeys(("--distributed", "--world_size", "--rank", "--master_port"), _LAUNCH),
    "--fsdp_sharding_strategy": "--parallel fsdp shards like FULL_SHARD, ddp not at all",
    "--fsdp_mixed_precision": "--precision bf16 is what it means",
    "--fsdp_cpu_offload": "nothing is offloaded; --gradient_checkpointing saves memory",
    **dict.fromkeys(("--temp_checkpoint_dir", "--auto_detect_temp_dir"), _FOLDER),
    "--keep_local_checkpoints": "--keep_last is what it means",
    "--save_to_temp_every_n_steps": "--save_every_n_steps is the nearest",
    "--max_batches_per_epoch": "--max_steps ends a run early",
    "--progress_tracking": "--progress is what it means",
}
"""Flags of the published ``train_dit_distributed.py`` that ``train`` has under other names."""


@dataclass(frozen=True)
class TrainFlags:
    """What the command takes beside the options of the run.

    Attributes:
        config: JSON or TOML file of options; flags override it.
        print_config: print all options as JSON, and stop.
        dry_run: check everything, print the plan, and stop.
    """

    config: Annotated[str | None, Flag("FILE")] = None
    print_config: bool = False
    dry_run: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    add_flags(parser, TrainFlags)
    add_flags(parser, TrainingOptions, partial=True)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is complete, 143 when it stopped on a signal after saving."""
    flags = TrainFlags(**given(TrainFlags, args))
    values = read_options_file(flags.config) if flags.config else {}
    options = TrainingOptions.from_dict({**values, **given(TrainingOptions, args)})
    if flags.print_config:
        print(json.dumps(options.to_dict(), indent=2))
        return 0
    if flags.dry_run:
        print(json.dumps(prepare(options, World()).describe(), indent=2))
        return 0
    try:
        result = train(options)
    except TrainingInterrupted as stop:
        print(f"blip3o-fast train: {stop}", file=sys.stderr)
        return stop.exit_status
    if os.environ.get("RANK", "0") != "0":
        return 0
    if result.before == result.steps:
        print(f"nothing to do: {result.folder} is complete after {count(result.steps, 'step')}")
    if result.best is not None:
        print(
            f"best validation: token cosine {result.best.token_cosine:.4f}, image cosine "
            f"{result.best.image_cosine:.4f} after step {result.best.step}; run in {result.folder}"
        )
    return 0
