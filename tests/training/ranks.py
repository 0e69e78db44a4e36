"""Runs of several processes, as torchrun would start them: a line ``OPTIONS.json COUNT`` a run.

This process imports torch once and forks the processes of each run, which saves their imports. Each
leaves what it saw beside the options; a line on standard output tells how they ended.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch

from blip3o_fast.training import TrainingInterrupted, TrainingOptions, train


def run_rank(path: Path) -> None:
    """Train by the options in a file; ``stop_after`` signals one process, after so many steps."""
    torch.set_num_threads(1)
    values = json.loads(path.read_text())
    stop_after = values.pop("stop_after", None)

    def on_step(record):
        if record.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        result = train(TrainingOptions.from_dict(values), on_step=on_step)
        seen = {"steps": result.steps, "losses": result.losses}
    except TrainingInterrupted as stop:
        seen = {"stopped": str(stop.checkpoint)}
    path.with_suffix(f".rank{os.environ['RANK']}").write_text(json.dumps(seen))


def start(path: Path, rank: int) -> int:
    """A child that is one process of the run; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(2, 1)  # Gloo of some versions talks on standard output
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            run_rank(path)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def main() -> None:
    """Serve runs until standard input ends."""
    for line in sys.stdin:
        name, count = line.split()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
        children = [start(Path(name), rank) for rank in range(int(count))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
