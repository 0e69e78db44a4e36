"""Command lines made of dataclasses: a flag for every field.

A field's name is its flag and its annotation says what the flag takes. The help is the text of the
docstring's ``Attributes``, with the default.
"""

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from blip3o_fast.checked import alternatives, annotations, base_type, is_required


class Flag(NamedTuple):
    """How the command line spells a field, where its name and type do not settle it.

    Attributes:
        metavar: what stands for the value in the help.
        positional: the value is given without a flag.
        one_of: exactly one of the fields with the same ``one_of`` is given.
    """

    metavar: str | tuple[str, ...] | None = None
    positional: bool = False
    one_of: str | None = None


def help_texts(cls: type) -> dict[str, str]:
    """What each field means, from the ``Attributes`` of the docstring, without the full stop."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    section, _, _ = section.partition("\n\n")
    texts: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {5,}.+)*)", section, re.MULTILINE):
        for name in names.split(", "):
            texts[name] = " ".join(text.split()).removesuffix(".")
    return texts


def add_flags(parser: argparse.ArgumentParser, cls: Any, *, partial: bool = False) -> None:
    """Add a flag for every field of dataclass ``cls``; ``given`` finds what was typed.

    Args:
        parser: where to.
        cls: its fields' names are the flags.
        partial: no flag is required, for values that may come from elsewhere too.
    """
    texts = help_texts(cls)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        flag = next((x for x in annotations(field.type) if isinstance(x, Flag)), Flag())
        options = _reader(field.type)
        text = texts.get(field.name, "").replace("%", "%%")
        if not flag.positional:
            text += " (required)" if is_required(field) else f" (default: {_shown(field)})"
        if flag.metavar is not None:
            options["metavar"] = flag.metavar
        names = [f"--{field.name}"]
        if options.get("action") is Switch:
            names.append(f"--no_{field.name}")
        if flag.positional:
            names = [field.name]
        elif is_required(field) and not partial:
            options["required"] = True
        target: Any = parser
        if flag.one_of is not None:
            if flag.one_of not in groups:
                groups[flag.one_of] = parser.add_mutually_exclusive_group(required=True)
            target = groups[flag.one_of]
        target.add_argument(*names, default=argparse.SUPPRESS, help=text, **options)


def given(cls: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``cls`` that were typed, by name."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name in names
    }


class Switch(argparse.Action):
    """``--name`` is true, ``--no_name`` is false, in the published commands' underscore style."""

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


def _shown(field: "dataclasses.Field[Any]") -> Any:
    """A default as the help shows it."""
    return list(field.default) if isinstance(field.default, tuple) else field.default


def _reader(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    members = [base_type(m) for m in alternatives(kind) if m is not types.NoneType]
    words = [word for m in members if get_origin(m) is Literal for word in get_args(m)]
    if bool in members:
        return {"action": Switch}
    if words:
        return {"choices": words} if len(members) == 1 else {"type": _number_or(words)}
    if get_origin(members[0]) is tuple:
        inner = get_args(members[0])
        return {"type": base_type(inner[0]), "nargs": "+" if inner[-1] is Ellipsis else len(inner)}
    return {"type": members[0]}


def _number_or(words: Sequence[str]) -> Callable[[str], float | str]:
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
