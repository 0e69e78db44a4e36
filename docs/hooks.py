"""What ``mkdocs.yml`` cannot say: pages outside of ``docs``, and formulas without a network.

The site has the layout of the repository, so a page and its links are the same here, on a code
host and on the disk.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("benchmarks/README.md", "benchmarks/SCALING.md", "kernels/README.md"),
    *("kernels/csrc/README.md", "kernels/predicted/README.md"),
)
"""Pages that are not under ``docs``; pictures of results and the notebook come with them."""
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def pages() -> list[Path]:
    """Every page of the site, relative to the repository."""
    own = [path.relative_to(ROOT) for path in sorted((ROOT / "docs").rglob("*.md"))]
    return [*map(Path, OUTSIDE), *own]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give each file its path in the repository."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    kinds = ("benchmarks/**/*.png", "examples/*.ipynb", "docs/*.css")
    others = [path for kind in kinds for path in ROOT.glob(kind)]
    for path in (*pages(), *(path.relative_to(ROOT) for path in sorted(others))):
        files.append(File(str(path), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Code hosts read Markdown inside of ``details``; Python-Markdown wants to be told."""
    return markdown.replace("<details>", '<details markdown="1">')


def on_page_content(content: str, **_: object) -> str:
    """Formulas as MathML, which browsers draw by themselves; flags marked for the style sheet."""
    return _FORMULA.sub(_mathml, content).replace("<code>--", '<code class="flag">--')


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    formula = convert(html.unescape(match[2]), display=display)
    return f'<{match[1]} class="formula">{formula}</{match[1]}>'
