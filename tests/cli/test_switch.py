"""Booleans with a --no_ form."""

import argparse

import pytest

from blip3o_fast.cli.switch import add_switch


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], True),
        (["--use_heun"], True),
        (["--no_use_heun"], False),
        (["--no_use_heun", "--use_heun"], True),
    ],
)
def test_switch(argv, value):
    parser = argparse.ArgumentParser()
    add_switch(parser, "use_heun", default=True, text="two evaluations a step")
    assert parser.parse_args(argv).use_heun is value
