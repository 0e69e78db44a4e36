"""Writes the figures of the documents from the files of results.

    python benchmarks/render.py            write them
    python benchmarks/render.py --check    write nothing; exit with 1 and name what differs

README.md, pages of docs and benchmarks/README.md have blocks from ``<!-- results of ... -->`` to
``<!-- /results -->`` that are made from the JSON files under ``benchmarks/results``, which programs
wrote; the text around them is written by hand. SCALING.md is made by ``scaling``.
"""

import argparse
import sys
from collections.abc import Sequence
from os.path import relpath
from pathlib import Path

import scaling
from read_results import Kind, Result, read_results
from result_tables import headline, section

ROOT = Path(__file__).resolve().parents[1]
SPEED, FITTED, ZERO_TIME, CONVENTIONS, EVERYTHING = (
    f"<!-- results of {what} -->"
    for what in ("speed", "fitted solvers", "training at zero", "conventions", "everything")
)
END = "<!-- /results -->"
BLOCKS: dict[str, dict[str, tuple[Kind, ...]]] = {
    "README.md": {SPEED: ("bench", "sampling")},
    "docs/solvers.md": {FITTED: ("fitted",), ZERO_TIME: ("zero_time",)},
    "docs/published.md": {CONVENTIONS: ("conventions",)},
}
"""Page to marker to the kinds of results that stand there, in short."""
OWN = "benchmarks/README.md"
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
    texts: dict[Path, str] = {}
    for name, blocks in BLOCKS.items():
        path = root / name
        texts[path] = read(path) or ""
        for begin, kinds in blocks.items():
            chosen = [result for result in results if result.kind in kinds]
            texts[path] = replace_block(path, texts[path], begin, short(chosen, path, root))
    own = root / OWN
    texts[own] = replace_block(own, read(own) or "", EVERYTHING, long(results, own.parent))
    return {**texts, root / "benchmarks" / scaling.PAGE.name: scaling.render()}


def short(results: list[Result], page: Path, root: Path) -> str:
    """A block of a page that is not about results alone."""
    parts = [text for result in results if (text := headline(result, page.parent))]
    if not parts:
        return NONE
    parts.append(f"All figures: [{OWN}]({relpath(root / OWN, page.parent)}).")
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
