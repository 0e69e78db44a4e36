"""``blip3o-fast train``: one flag for every field of ``TrainingOptions``.

Values come from the defaults, then ``--config FILE`` (JSON or TOML), then the flags that were
typed. A run that was stopped goes on when the same command is given again.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from blip3o_fast.cli.switch import add_switch
from blip3o_fast.processes import World
from blip3o_fast.training import TrainingInterrupted, TrainingOptions, train
from blip3o_fast.training.option_types import alternatives
from blip3o_fast.training.options import help_of, option_fields, read_options_file
from blip3o_fast.training.run import prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``, generated from ``TrainingOptions``."""
    parser.add_argument("--config", help="JSON or TOML file of options; flags override it")
    add_switch(parser, "print_config", default=False, text="print all options as JSON, and stop")
    add_switch(parser, "dry_run", default=False, text="check everything, print the plan, and stop")
    for field in option_fields():
        text = help_of(field.name).replace("%", "%%")
        if field.default is not MISSING:
            text += f" (default: {field.default})"
        if bool in _members(field.type):
            add_switch(parser, field.name, default=argparse.SUPPRESS, text=text)
        else:
            parser.add_argument(
                f"--{field.name}", default=argparse.SUPPRESS, help=text, **_reader(field.type)
            )


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is complete, 143 when it stopped on a signal after saving."""
    typed = {field.name for field in option_fields()} & vars(args).keys()
    values = read_options_file(args.config) if args.config else {}
    options = TrainingOptions.from_dict({**values, **{name: vars(args)[name] for name in typed}})
    if args.print_config:
        print(json.dumps(options.to_dict(), indent=2))
        return 0
    if args.dry_run:
        print(json.dumps(prepare(options, World()).describe(), indent=2))
        return 0
    try:
        result = train(options)
    except TrainingInterrupted as stop:
        print(f"blip3o-fast train: {stop}", file=sys.stderr)
        return stop.exit_status
    main_process = os.environ.get("RANK", "0") == "0"
    if result.best is not None and main_process:
        print(
            f"best validation: token cosine {result.best.token_cosine:.4f}, image cosine "
            f"{result.best.image_cosine:.4f} after step {result.best.step}; run in {result.folder}"
        )
    return 0


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type, None left out."""
    return tuple(member for member in alternatives(kind) if member is not NoneType)


def _reader(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    members = _members(kind)
    words = [w for m in members if get_origin(m) is Literal for w in get_args(m)]
    if words and len(members) == 1:
        return {"choices": words}
    if words:
        return {"type": _number_or(words)}
    if get_origin(members[0]) is tuple:
        return {"type": int, "nargs": 3, "action": _Triple}
    return {"type": members[0]}


def _number_or(words: list[str]) -> Callable[[str], float | str]:
    """A reader of a number or one of some words."""

    def read(text: str) -> float | str:
        if text in words:
            return text
        try:
            return float(text)
        except ValueError:
            expected = " or ".join(["a number", *words])
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return read


class _Triple(argparse.Action):
    """Three numbers as the tuple that the option holds."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store them."""
        del parser, option_string
        setattr(namespace, self.dest, tuple(values))
