"""A signal ends a process that waits for another which no longer answers."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAITING = """
import sys, torch
from blip3o_fast import processes, signals
signals.PATIENCE = 1.0
with processes.join_world("auto", torch.device("cpu")) as world:
    with signals.StopSignals(alone=False) as asked:
        while not world.agree(asked.asked()):
            print("step", flush=True)
"""


def start(rank, port):
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    facts = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", WAITING],
        env={**os.environ, **facts, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def pair():
    """Two processes that agree on every step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [start(rank, port) for rank in range(2)]
    for child in children:
        while child.stdout.readline() != "step\n":
            assert child.poll() is None, child.stderr.read()
    yield children
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_process_whose_peer_is_stopped(pair, number):
    first, second = pair
    second.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    first.send_signal(number)
    _, err = first.communicate(timeout=20)
    assert first.returncode == 128 + number
    assert "another process of this run does not answer" in err


def test_processes_that_answer_stop_together(pair):
    pair[1].send_signal(signal.SIGTERM)
    for child in pair:
        child.communicate(timeout=20)
        assert child.returncode == 0
