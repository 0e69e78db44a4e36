"""The page about scale: text and numbers cannot disagree, and its commands exist."""

import argparse
import re
import shlex
import string

import pytest
import scaling
import tables

from blip3o_fast.cli import main
from blip3o_fast.options import extract, generate, train


def test_the_committed_page_is_what_is_made():
    assert scaling.PAGE.read_text() == scaling.render()


def test_every_value_is_used():
    template = string.Template(scaling.TEMPLATE.read_text())
    assert set(template.get_identifiers()) == set(scaling.values())


def test_figures_that_can_be_worked_out_by_hand():
    """27 million samples of 256 tokens, 4096 + 1024 numbers of 2 bytes; 227,474,014 parameters."""
    sample = 256 * (4096 + 1024) * 2
    by_hand = {
        "sample_size": f"{sample / 1e6:.2f} MB",
        "set": f"{27e6 * sample / 1e12:.1f} TB",
        "slow_epoch": f"{27e6 * sample / 10e9 / 3600:.2f} h",
        "gradients": f"{227_474_014 * 4 / 1e6:.0f} MB",
        "order": f"{27 * 8} MB",
    }
    assert {name: scaling.values()[name] for name in by_hand} == by_hand


COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", scaling.TEMPLATE.read_text(), re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_have_the_flags_that_they_name(line):
    words = shlex.split(line)
    words = words[words.index("blip3o_fast" if words[0] == "torchrun" else "blip3o-fast") + 1 :]
    assert words[0] in main.COMMANDS
    parser = argparse.ArgumentParser(exit_on_error=False)
    {"train": train, "generate": generate, "extract": extract}[words[0]].add_arguments(parser)
    parser.parse_args(words[1:])


def test_the_flags_named_in_sentences_exist():
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for command in (train, generate, extract):
        command.add_arguments(parser)
    text = re.sub(r"```.*?```", "", scaling.TEMPLATE.read_text(), flags=re.DOTALL)
    known = " ".join(s for action in parser._actions for s in action.option_strings).split()
    named = set(re.findall(r"`(--\w+)[ `]", text + "".join(scaling.values().values())))
    assert named and named <= {*known, "--groups"}


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (70.8e12, "B", "70.8 TB"),
        (999.6, "B", "1,000 B"),
        (1e9, "B/s", "1 GB/s"),
    ],
)
def test_numbers(value, unit, text):
    assert tables.number(value, unit) == text
