"""Writes the figures of the documents from the files of results.

    python benchmarks/render.py            write them
    python benchmarks/render.py --check    write nothing; exit with 1 and name what differs

README.md and benchmarks/README.md have blocks between ``<!-- results of ... -->`` and
``<!-- /results -->`` that are made from the JSON files under ``benchmarks/results``, which programs
wrote; the text around them is written by hand. SCALING.md is made by ``scaling``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import scaling
from read_results import Result, read_results
from result_tables import headline, section

ROOT = Path(__file__).resolve().parents[1]
DEMO, SPEED, FITTED, ZERO_TIME, CONVENTIONS, EVERYTHING = (
    f"<!-- results of {what} -->"
    for what in (
        *("the demo", "speed", "fitted solvers", "training at zero"),
        *("conventions", "everything"),
    )
)
END = "<!-- /results -->"
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
    """The text that each document should have.

    Raises:
        ValueError: naming a document without its markers, or a file that is no result.
    """
    results = read_results(root / RESULTS)
    top, own = root / "README.md", root / "benchmarks" / "README.md"
    texts = {path: read(path) or "" for path in (top, own)}
    blocks = {
        DEMO: ("demo",),
        SPEED: ("bench", "published"),
        FITTED: ("fitted", "sampling"),
        ZERO_TIME: ("zero_time",),
        CONVENTIONS: ("conventions",),
    }
    for begin, kinds in blocks.items():
        chosen = [result for result in results if result.kind in kinds]
        texts[top] = replace_block(top, texts[top], begin, short(chosen, root))
    texts[own] = replace_block(own, texts[own], EVERYTHING, long(results, own.parent))
    return {
        **texts,
        root / "benchmarks" / scaling.PAGE.name: scaling.render(),
    }


def short(results: list[Result], folder: Path) -> str:
    """A block of README.md."""
    parts = [text for result in results if (text := headline(result, folder))]
    if not parts:
        return NONE
    parts.append("All figures: [benchmarks/README.md](benchmarks/README.md).")
    return "\n\n".join(parts)


def long(results: list[Result], folder: Path) -> str:
    """The block of benchmarks/README.md."""
    return "\n\n".join(section(result, folder) for result in results) or NONE


def replace_block(path: Path, text: str, begin: str, block: str) -> str:
    """``text``, of the document at ``path``, with another block."""
    before, found, rest = text.partition(begin)
    old, ended, after = rest.partition(END)
    if not found or not ended or begin in rest or "<!-- results" in old:
        raise ValueError(f"{path}: expected {begin} once and {END} after it")
    return f"{before}{begin}\n{block}\n{END}{after}"


def read(path: Path) -> str | None:
    """The text of a file, None if there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
