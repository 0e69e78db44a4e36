"""Boolean options with a ``--no_`` form, in the underscore style of the published commands."""

import argparse
from collections.abc import Sequence
from typing import Any


class Switch(argparse.Action):
    """``--name`` is true, ``--no_name`` is false."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Store what the spelling says."""
        del parser, values
        assert option_string is not None
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def add_switch(
    parser: argparse.ArgumentParser, name: str, *, default: bool | str | None, text: str
) -> None:
    """Add ``--name`` and ``--no_name``."""
    parser.add_argument(f"--{name}", f"--no_{name}", action=Switch, default=default, help=text)
