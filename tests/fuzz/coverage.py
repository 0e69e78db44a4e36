"""Which readers of the library each parser of the suite runs.

PYTHONPATH=tests python -m tests.fuzz.coverage
"""

import ast
import sys
import tempfile
from pathlib import Path

from tests.fuzz.parsers import PARSERS

ROOT = Path(__file__).parents[2]
BORDER = {
    *("reading", "read_json", "parse_json", "open_tar", "load_data", "decode_record"),
    *("load_rgb", "decode_caption", "npy_header", "loads", "safe_open", "load_file"),
}
"""These, and whoever calls one of them, read what others wrote."""


def readers() -> set[str]:
    """Functions of the library that are or call one of ``BORDER``, by module and name."""
    found = set()
    for path in sorted((ROOT / "blip3o_fast").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)

        def visit(node: ast.AST, name: str) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    if child.name in BORDER:
                        found.add(f"{name}.{child.name}")
                    visit(child, f"{name}.{child.name}")
                    continue
                if isinstance(child, ast.Call) and _called(child) in BORDER:
                    found.add(name)
                visit(child, name)

        visit(ast.parse(path.read_text(encoding="utf-8")), module)
    return found


def reached(folder: Path) -> dict[str, set[str]]:
    """The readers that each parser's whole file runs, in this thread."""
    known, found = readers(), {}
    for name, parser in PARSERS.items():
        (folder / name).mkdir()
        parser.seed(folder / name)
        ran: set[str] = set()

        def note(frame, event, _, ran=ran):
            if event == "call":
                ran.add(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}")

        sys.setprofile(note)
        try:
            parser.read(folder / name)
        finally:
            sys.setprofile(None)
        found[name] = ran & known
    return found


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for parser, names in reached(Path(temporary)).items():
            print(f"{parser:16}", *sorted(names))  # noqa: T201
