"""Faults of files in one line, and text that would act."""

import csv
import errno
import io
from pathlib import Path

import pytest

from blip3o_fast.errors import OptionError
from blip3o_fast.untrusted import cell, one_line, reading

PATH = Path("folder/x.bin")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ValueError("bad\nvalue"), "folder/x.bin: expected words (bad value)"),
        (KeyError("eva"), "folder/x.bin: expected words (KeyError: 'eva')"),
        (RecursionError(), "folder/x.bin: expected words (RecursionError)"),
        (MemoryError(), "folder/x.bin: expected words (MemoryError)"),
        (OSError(errno.EIO, "Input/output error"), "([Errno 5] Input/output error)"),
        (ValueError("\x1b[2J\u202e"), "expected words (\\x1b[2J\\u202e)"),
        (ValueError("folder/x.bin: expected more"), "folder/x.bin: expected more"),
        (ValueError("x.bin: expected more"), "x.bin: expected more"),
        (ValueError("a" * 5000), "a..."),
    ],
)
def test_any_fault_names_the_file_in_one_line(fault, message):
    with pytest.raises(ValueError) as caught, reading(PATH, "words"):
        raise fault
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_the_system_says_of_a_file_stays(tmp_path):
    with pytest.raises(FileNotFoundError), reading(tmp_path, "words"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, "words"):
        raise KeyboardInterrupt
    with pytest.raises(OptionError, match="expected words"), reading(PATH, "words", OptionError):
        raise ValueError


def test_a_line_for_a_terminal():
    assert one_line("a\r\n  b\tc") == "a b c"
    assert one_line("\x1b]0;x\x07 \udc80 ü 猫") == "\\x1b]0;x\\x07 \\udc80 ü 猫"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(f"{sign}cmd|' /C calc'!A0", f"'{sign}cmd|' /C calc'!A0") for sign in "=+-@"],
        *[("a\rb\x1b[2J", "a\\rb\\x1b[2J"), ("\t=1", "\\t=1"), ("\ud800", "\\ud800")],
        *[('a,b "c"', 'a,b "c"'), ("", ""), ("coco_1", "coco_1")],
    ],
)
def test_a_cell_of_a_spreadsheet(text, expected):
    out = io.StringIO()
    csv.writer(out).writerow([cell(text), "1"])
    out.getvalue().encode()
    assert next(csv.reader(io.StringIO(out.getvalue()))) == [expected, "1"]
