"""Writes the documents that hold figures, from the figures.

    python benchmarks/render.py            write them
    python benchmarks/render.py --check    write nothing; exit with 1 and name what differs

README.md and benchmarks/README.md have a block between ``<!-- results -->`` and
``<!-- /results -->`` that is made from the JSON files under ``benchmarks/results``, which programs
wrote; the text around it is written by hand. SCALING.md is made by ``scaling``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import scaling
from read_results import Result, read_results
from result_tables import headline, section

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
RESULTS = "benchmarks/results"
NONE = f"No results are committed under `{RESULTS}/` yet."


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write or check every document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    checking = parser.parse_args(arguments).check
    try:
        wanted = documents(root)
    except ValueError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 1
    different = [path for path, text in wanted.items() if read(path) != text]
    for path in different:
        if checking:
            print(f"{path}: differs from the results; run benchmarks/render.py", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return int(checking and bool(different))


def documents(root: Path) -> dict[Path, str]:
    """What each document should hold.

    Raises:
        ValueError: naming a document without its markers, or a file that is no result.
    """
    results = read_results(root / RESULTS)
    top, own = root / "README.md", root / "benchmarks" / "README.md"
    return {
        top: replace_block(top, short(results)),
        own: replace_block(own, long(results, own.parent)),
        root / "benchmarks" / scaling.PAGE.name: scaling.render(),
    }


def short(results: list[Result]) -> str:
    """The block of README.md."""
    parts = [text for result in results if (text := headline(result))]
    if not parts:
        return NONE
    parts.append("All figures: [benchmarks/README.md](benchmarks/README.md).")
    return "\n\n".join(parts)


def long(results: list[Result], folder: Path) -> str:
    """The block of benchmarks/README.md."""
    return "\n\n".join(section(result, folder) for result in results) or NONE


def replace_block(path: Path, block: str) -> str:
    """The text of a document with another block."""
    text = read(path) or ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected {BEGIN} once and {END} once after it")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def read(path: Path) -> str | None:
    """The text of a file, None if there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
