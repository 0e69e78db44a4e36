"""Files that others made, and text of theirs that people are shown.

A damaged or hostile file can make a parser raise anything. ``reading`` is the one place where that
becomes a line that names the file. Whoever reads checks sizes before allocating.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 400  # characters of a reason


@contextmanager
def reading(path: Path, expected: str, error: type[ValueError] = ValueError) -> Iterator[None]:
    """Inside the block, whatever a parser raises becomes ``error``, one line that names the file.

    What the system says of a file by name (missing, no permission) stays as it is, and so does a
    ``ValueError`` that names the file already.

    Args:
        path: what is read.
        expected: what it should be, for the message.
        error: raised.
    """
    try:
        yield
    except Exception as fault:
        says_so = isinstance(fault, OSError) and fault.filename is not None
        named = isinstance(fault, error) and str(fault).startswith((str(path), path.name))
        if says_so or named:
            raise
        raise error(f"{path}: expected {expected} ({reason(fault)})") from fault


def reason(fault: BaseException) -> str:
    """What an exception says, in one line; its type where that says more."""
    text = one_line(str(fault))
    if type(fault) in (ValueError, OSError) and text:
        return text
    return f"{type(fault).__name__}: {text}" if text else type(fault).__name__


def one_line(text: str) -> str:
    """``text`` as a terminal may show it: what would act, or break the line, is escaped."""
    joined = " ".join(text.split())
    shown = joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def cell(text: str) -> str:
    """``text`` for a table of a spreadsheet, which would run what begins like a formula."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown
