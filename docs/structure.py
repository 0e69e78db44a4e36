"""Prints the structure of the library, drawn from its own imports as a Mermaid diagram.

    python docs/structure.py

Boxes are the packages and modules of ``blip3o_fast``, and the kernels. Arrows are imports,
without those that follow from others. Numbers are files and lines.
"""

from itertools import permutations
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SOURCES = {"blip3o_fast": ROOT / "blip3o_fast", "blip3o_kernels": ROOT / "kernels/blip3o_kernels"}


def boxes(graph: grimp.ImportGraph) -> list[str]:
    """Importable names of the boxes."""
    return [*sorted(graph.find_children("blip3o_fast")), "blip3o_kernels"]


def arrows(graph: grimp.ImportGraph, names: list[str]) -> list[tuple[str, str]]:
    """Imports between boxes that no longer path implies."""
    direct = {
        (a, b)
        for a, b in permutations(names, 2)
        if graph.direct_import_exists(importer=a, imported=b, as_packages=True)
    }
    reached = {a: {b for x, b in direct if x == a} for a in names}
    changed = True
    while changed:
        changed = False
        for a in names:
            further = set().union(*(reached[b] for b in reached[a])) - reached[a]
            changed |= bool(further)
            reached[a] |= further
    return sorted(
        (a, b) for a, b in direct if not any(b in reached[c] for c in names if (a, c) in direct)
    )


def size(name: str) -> str:
    """Files and lines of a box."""
    top, _, rest = name.partition(".")
    place = SOURCES[top].joinpath(*rest.split(".")) if rest else SOURCES[top]
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    return f"{len(files)} files, {lines:,} lines" if len(files) > 1 else f"{lines:,} lines"


def mermaid() -> str:
    """The diagram."""
    graph = grimp.build_graph(*SOURCES, cache_dir=None)
    names = boxes(graph)
    short = {name: name.removeprefix("blip3o_fast.") for name in names}
    lines = ["graph TD"]
    lines += [f'  {short[name]}["{short[name]}<br/>{size(name)}"]' for name in names]
    lines += [f"  {short[a]} --> {short[b]}" for a, b in arrows(graph, names)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"```mermaid\n{mermaid()}\n```")
