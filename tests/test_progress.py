"""A bar on a terminal, lines anywhere else."""

import io
import sys

import pytest

from blip3o_fast import progress
from blip3o_fast.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_every_ten_seconds_and_at_the_end(clock, capsys):
    with Progress("generate", 30) as bar:
        for _ in range(30):
            clock[0] += 1.0
            bar.update()
    err = capsys.readouterr().err
    assert "\r" not in err
    assert err.splitlines() == [
        "generate: 10/30 samples, 1 samples/s, 10 s so far, 20 s left",
        "generate: 20/30 samples, 1 samples/s, 20 s so far, 10 s left",
        "generate: 30/30 samples, 1 samples/s, 30 s so far",
    ]


def test_work_of_an_earlier_run_is_no_rate_of_this_one(clock, capsys):
    with Progress("extract", None, "image", done=5) as bar:
        clock[0] += 2.0
        bar.update()
    assert capsys.readouterr().err == "extract: 6 images, 0.5 images/s, 2 s so far\n"


def test_steps_that_are_repeated(clock, capsys):
    with Progress("sampling", unit="step") as bar:
        clock[0] += 1.0
        bar.total = 4
        bar.update(3)
        bar.update(-3)
        bar.update(1)
    assert capsys.readouterr().err.startswith("sampling: 1/4 steps, ")


def test_items_count_when_they_are_done(clock, capsys):
    bar = Progress("extract", 2, "image")
    seen = [(item, bar.done) for item in bar.over("ab")]
    assert seen == [("a", 0), ("b", 1)] and bar.done == 2


def test_silence(capsys):
    with Progress("generate", 3, enabled=False) as bar:
        bar.update(3)
        bar.say("nobody hears this")
    with Progress("nothing to do", 0):
        pass
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("generate", 3) as bar:
        bar.total = 6
        bar.update(6)
    assert "6/6" in terminal.getvalue() and "samples/s," not in terminal.getvalue()
