"""Command lines made of dataclasses: a flag for every field.

A field's name is its flag and its annotation says what the flag takes. The help is the text of the
docstring's ``Attributes``, with the default, in the groups of the docstring.
"""

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
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


class Help(argparse.HelpFormatter):
    """Help whose usage names what is required; the rest is ``[options]``."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        """Add the usage without the options that may be left out."""
        actions, groups = list(actions), [group for group in groups if group.required]
        chosen = {id(action) for group in groups for action in group._group_actions}
        kept = [a for a in actions if a.required or not a.option_strings or id(a) in chosen]
        if len(kept) < len(actions):
            kept.append(argparse.Action([], "options", metavar="[options]"))
        super().add_usage(usage, kept, groups, prefix)


def help_texts(cls: type) -> dict[str, dict[str, str]]:
    """What each field means, by the title of its group, without the full stop.

    The groups are the docstring's sections ``Attributes:``, which may have a title behind the
    colon.
    """
    groups: dict[str, dict[str, str]] = {}
    for section in inspect.cleandoc(cls.__doc__ or "").split("\n\n"):
        head, _, body = section.partition("\n")
        if not head.startswith("Attributes:"):
            continue
        texts = groups.setdefault(head.removeprefix("Attributes:").strip(), {})
        for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {5,}.+)*)", body, re.MULTILINE):
            for name in names.split(", "):
                texts[name] = " ".join(text.split()).removesuffix(".").replace("``", "")
    return groups


def add_flags(parser: argparse.ArgumentParser, cls: Any, *, partial: bool = False) -> None:
    """Add a flag for every field of dataclass ``cls``; ``given`` finds what was typed.

    Args:
        parser: where to.
        cls: its fields' names are the flags.
        partial: no flag is required by the parser, for values that may come from elsewhere too.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    choices: dict[str, Any] = {}
    for title, texts in help_texts(cls).items():
        group = parser.add_argument_group(title) if title else parser
        for name, text in texts.items():
            _add_flag(group, fields.pop(name), text, choices, partial)
    for field in fields.values():
        _add_flag(parser, field, "", choices, partial)


def _add_flag(
    group: Any, field: "dataclasses.Field[Any]", text: str, choices: dict[str, Any], partial: bool
) -> None:
    flag = next((x for x in annotations(field.type) if isinstance(x, Flag)), Flag())
    options = _reader(field)
    if flag.metavar is not None:
        options["metavar"] = flag.metavar
    names = [f"--{field.name}"]
    if options.get("action") is Switch:
        names.append(f"--no_{field.name}")
    if flag.positional:
        names = [field.name]
        options["metavar"] = flag.metavar or field.name.upper()
    elif is_required(field) and not partial:
        options["required"] = True
    if flag.one_of is not None:
        if flag.one_of not in choices:
            choices[flag.one_of] = group.add_mutually_exclusive_group(required=True)
        group = choices[flag.one_of]
    if options.get("metavar") == _NAME:
        text += f"; one of {', '.join(options['choices'])}"
    text = _with_default(text, field, flag).replace("%", "%%")
    group.add_argument(*names, default=argparse.SUPPRESS, help=text, **options)


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


def _with_default(text: str, field: "dataclasses.Field[Any]", flag: Flag) -> str:
    """The help of a field: what the docstring says of None is the default's meaning."""
    if flag.positional or flag.one_of:
        return text
    if is_required(field):
        return f"{text} (required)".strip()
    if field.default is None:
        text, _, meaning = text.partition("; None: ")
        return f"{text} (default: {meaning})" if meaning else text
    shown = field.default
    if isinstance(shown, bool):
        shown = "on" if shown else "off"
    elif isinstance(shown, tuple):
        shown = " ".join(map(str, shown))
    return f"{text} (default: {shown})".strip()


def _reader(field: "dataclasses.Field[Any]") -> dict[str, Any]:
    """How argparse reads a value of this field, and what stands for it in the help."""
    members = [base_type(m) for m in alternatives(field.type) if m is not types.NoneType]
    words = [word for m in members if get_origin(m) is Literal for word in get_args(m)]
    if bool in members:
        return {"action": Switch}
    if words and len(members) == 1:
        long = len(",".join(words)) > _LONGEST
        return {"choices": words, **({"metavar": _NAME} if long else {})}
    if words:
        return {"type": _number_or(words), "metavar": "|".join([_PLACE[float], *words])}
    kind = members[0]
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        count = "+" if inner[-1] is Ellipsis else len(inner)
        kind = base_type(inner[0])
        return {"type": kind, "metavar": _PLACE[kind], "nargs": count}
    ending = field.name.rpartition("_")[2]
    place = ending.upper() if ending in ("dir", "path", "file") else _PLACE[kind]
    return {"type": kind, "metavar": place}


_PLACE = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""What stands for a value of a type in the help."""
_NAME = "NAME"  # stands for one of many words
_LONGEST = 50  # characters of words that the help shows beside their flag


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
