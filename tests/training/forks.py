"""Runs in child processes, some killed: ``python -m tests.training.forks SHARDS OUT ROUNDS SEED``.

The parent imports torch once and does no work with it, so forking is cheap and safe. Each round
kills a run at two random moments with SIGKILL, which no handler sees, and lets it end.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from blip3o_fast.training import train
from tests.training.runs import small_options

SETTINGS = {
    "max_steps": 16,
    "eval_every_n_steps": 4,
    "save_every_n_steps": 2,
    "eva_adapter_dropout": 0.3,
    "ema_decay": 0.9,
}


def start(shards: str, folder: Path) -> int:
    """A child that trains in ``folder``; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(small_options(chunked_embeddings_dir=shards, output_dir=str(folder), **SETTINGS))
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int, seconds: float | None) -> int | None:
    """The child's exit status; None if it had to be killed after some seconds."""
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def main() -> None:
    """Print how many runs were killed; every run must end well in the end."""
    shards, folder, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    duration = 0.0
    for name in ("warm", "whole"):  # the first run also waits for files that are read once
        started = time.monotonic()
        assert wait(start(shards, folder / name), None) == 0
        duration = time.monotonic() - started
    moments = random.Random(int(sys.argv[4]))
    killed = 0
    for i in range(rounds):
        for _ in range(2):
            status = wait(start(shards, folder / str(i)), moments.uniform(0, 0.9 * duration))
            assert status in (None, 0)
            killed += status is None
        assert wait(start(shards, folder / str(i)), None) == 0
    print(killed)  # noqa: T201


if __name__ == "__main__":
    main()
