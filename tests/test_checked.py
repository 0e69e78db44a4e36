"""Checked records: types, ranges, JSON, and the command line that follows from them."""

import argparse
import json
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from blip3o_fast.checked import (
    Count,
    Positive,
    Range,
    Share,
    check,
    check_names,
    describe,
    from_json,
)
from blip3o_fast.flags import Flag, Help, add_flags, given, help_texts


@dataclass(frozen=True)
class Inner:
    name: str
    share: Share = 0.5

    def __post_init__(self):
        check(self, "inner")


@dataclass(frozen=True)
class Order:
    """What is ordered.

    Attributes:
        where: a folder; 100 % of it is
            used.

    Attributes: Size
        width, height: pixels.

    Raises:
        ValueError: never.
    """

    where: Annotated[Path, Flag(positional=True)]
    first: Annotated[str | None, Flag("A", one_of="ends")] = None
    last: Annotated[str | None, Flag("Z", one_of="ends")] = None
    width: Count = 4
    height: Count | None = None
    rate: Positive | Literal["auto"] = 1.0
    kind: Literal["a", "b"] = "a"
    even: bool = True
    graph: bool | None = None
    grid: Annotated[tuple[int, int, int] | None, Flag(("D", "H", "W"))] = None
    counts: tuple[Count, ...] = (1, 2)
    inner: Inner | None = None
    more: tuple[Inner, ...] = ()


HERE = Path("here")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("where", "text", "where: expected Path, got 'text'"),
        ("width", 0, "width: expected at least 1, got 0"),
        ("width", 2.0, "width: expected an integer, got 2.0"),
        ("width", True, "width: expected an integer, got True"),
        ("height", -1, "height: expected at least 1, got -1"),
        ("height", "x", "height: expected an integer or none, got 'x'"),
        ("rate", 0.0, "rate: expected more than 0, got 0.0"),
        ("rate", float("nan"), "rate: expected a number or auto, got nan"),
        ("rate", float("inf"), "rate: expected a number or auto, got inf"),
        ("rate", "slow", "rate: expected a number or auto, got 'slow'"),
        ("kind", "c", "kind: expected a, b, got 'c'"),
        ("even", 1, "even: expected true or false, got 1"),
        ("grid", (1, 2), "grid: expected a list of 3 int or none, got (1, 2)"),
        ("grid", [1, 2, 3], "grid: expected a list of 3 int or none, got [1, 2, 3]"),
        ("counts", (1, 0), "counts: expected at least 1, got (1, 0)"),
        ("counts", (1, "x"), "counts: expected a list of int, got (1, 'x')"),
        ("more", (1,), "more: expected a list of Inner, got (1,)"),
        ("inner", {}, "inner: expected Inner or none, got {}"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(name, value, message):
    with pytest.raises(ValueError) as error:
        check(Order(**{"where": HERE, name: value}))
    assert str(error.value) == message


def test_good_values_pass():
    check(Order(HERE, "x", None, 1, None, 2, "b", False, True, (1, 2, 3), (), Inner("n"), ()))
    check(Order(HERE, rate="auto", counts=(3,), more=(Inner("n"),)))


@pytest.mark.parametrize(
    ("range_", "inside", "outside", "words"),
    [
        (Range(1), (1, 10**9), (0,), "at least 1"),
        (Range(0, 1), (0, 0.999), (1, -0.1), "at least 0 and below 1"),
        (Range(0, open=True), (1e-9,), (0,), "more than 0"),
    ],
)
def test_ranges(range_, inside, outside, words):
    assert all(x in range_ for x in inside) and not any(x in range_ for x in outside)
    assert str(range_) == words


def test_the_error_is_of_the_kind_asked_for_and_says_of_what():
    with pytest.raises(KeyErrorOfOurs, match=r"^order: width: "):
        check(Order(HERE, width=0), "order", KeyErrorOfOurs)


class KeyErrorOfOurs(ValueError):
    pass


def test_json_there_and_back():
    text = '{"where": "x", "grid": [1, 2, 3], "counts": [4], "more": [{"name": "a"}]}'
    order = from_json(Order, json.loads(text), "order")
    assert (order.grid, order.counts, order.more) == ((1, 2, 3), (4,), (Inner("a"),))
    assert from_json(Order, {"where": 1, "inner": {"name": "n", "share": 0}}, "order").inner == (
        Inner("n", 0)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "order: expected a JSON object, got list"),
        ({}, "order: missing where"),
        ({"where": 1, "widht": 2}, "unknown order key 'widht'; did you mean 'width'?"),
        ({"where": 1, "inner": {}}, "inner: missing name"),
        ({"where": 1, "inner": {"nmae": ""}}, "unknown inner key 'nmae'; did you mean 'name'?"),
        (
            {"where": 1, "more": [{"name": "n", "share": 1}]},
            "inner: share: expected at least 0 and",
        ),
    ],
)
def test_bad_json_is_named(values, message):
    with pytest.raises(ValueError) as error:
        from_json(Order, values, "order")
    assert str(error.value).startswith(message)


def test_names_without_a_near_one_list_the_known():
    with pytest.raises(ValueError, match="unknown key 'zzzz'; known: name, share"):
        check_names(Inner, ["name", "zzzz"], "key")


def test_help_comes_from_the_docstring():
    assert help_texts(Order) == {
        "": {"where": "a folder; 100 % of it is used"},
        "Size": {"width": "pixels", "height": "pixels"},
    }
    assert help_texts(Undocumented) == {}


@dataclass
class Undocumented:
    x: int = 0


def parse(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, Flags)
    return given(Flags, parser.parse_args(words))


@dataclass(frozen=True)
class Flags:
    """Flags.

    Attributes:
        where: a folder; 100 % of it is used.

    Attributes: Speed
        rate: of something.
        kind: of something else; None: either.
    """

    where: Annotated[Path, Flag(positional=True)]
    name: str
    first: Annotated[str | None, Flag("A", one_of="ends")] = None
    last: Annotated[str | None, Flag("Z", one_of="ends")] = None
    rate: Positive | Literal["auto"] = 1.0
    kind: Literal["a", "b"] | None = None
    even: bool = True
    grid: Annotated[tuple[int, int, int] | None, Flag(("D", "H", "W"))] = None
    counts: tuple[Count, ...] = (1, 2)


def test_what_is_typed_is_given_and_nothing_else():
    assert parse("x", "--name", "n", "--first", "1") == {
        "where": Path("x"),
        "name": "n",
        "first": "1",
    }
    words = "x --name n --last 2 --rate auto --kind b --no_even --grid 1 2 3 --counts 7 8 9"
    assert parse(*words.split()) == {
        "where": Path("x"),
        "name": "n",
        "last": "2",
        "rate": "auto",
        "kind": "b",
        "even": False,
        "grid": (1, 2, 3),
        "counts": (7, 8, 9),
    }
    assert parse("x", "--name", "n", "--first", "1", "--rate", "2")["rate"] == 2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--name n --first 1", "required: WHERE"),
        ("x --first 1", "required: --name"),
        ("x --name n", "one of the arguments --first --last is required"),
        ("x --name n --first 1 --last 2", "not allowed with argument --first"),
        ("x --name n --first 1 --rate fast", "expected a number or auto, got 'fast'"),
        ("x --name n --first 1 --kind c", "invalid choice: 'c'"),
        ("x --name n --first 1 --grid 1 2", "expected 3 arguments"),
    ],
)
def test_words_that_cannot_be_read(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "WHERE a folder; 100 % of it is used" in out
    assert "--rate X|auto of something (default: 1.0)" in out
    assert "--kind {a,b} of something else (default: either)" in out
    assert "--even, --no_even (default: on)" in out
    assert "--grid D H W" in out and "--counts N [N ...] (default: 1 2)" in out
    assert out.index("WHERE a folder") < out.index("Speed: --rate") < out.index("--kind {a,b} of")


def test_the_usage_names_what_is_required():
    parser = argparse.ArgumentParser(prog="run", formatter_class=Help)
    add_flags(parser, Flags)
    assert parser.format_usage() == (
        "usage: run --name TEXT (--first A | --last Z) WHERE [options]\n"
    )
    assert argparse.ArgumentParser(
        prog="run", add_help=False, formatter_class=Help
    ).format_usage() == ("usage: run\n")


def test_a_partial_command_line_requires_nothing(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser, Inner, partial=True)
    assert given(Inner, parser.parse_args([])) == {}
    assert "--name TEXT  (required)\n" in parser.format_help()


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], {}),
        (["--use_heun"], {"use_heun": True}),
        (["--no_use_heun"], {"use_heun": False}),
        (["--no_use_heun", "--use_heun"], {"use_heun": True}),
    ],
)
def test_switch(argv, value):
    Solver = make_dataclass("Solver", [("use_heun", bool, True)])
    parser = argparse.ArgumentParser()
    add_flags(parser, Solver)
    assert given(Solver, parser.parse_args(argv)) == value


def test_types_in_words():
    assert describe(int | str | None) == "an integer or text or none"
    assert describe(tuple[float, float]) == "a list of 2 float"
    assert describe(Count) == "an integer"
