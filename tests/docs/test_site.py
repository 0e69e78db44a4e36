"""The documents as a site: it builds without a warning, every link leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def test_pages_lie_where_their_sources_do(site):
    for page in ("index", "CONTRIBUTING", "docs/guides/translate", "benchmarks/index"):
        assert (site / f"{page}.html").is_file(), page
    for file in ("benchmarks/results/demo.png", "docs/site.css", "examples/translate.ipynb"):
        assert (site / file).is_file(), file


def test_no_page_needs_a_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="(https?:[^"]*)"', page.read_text())
        assert not loaded, page
        assert not re.search(r'<link rel="stylesheet" href="https?:', page.read_text()), page


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "docs/mathematics.html").read_text()
    assert text.count("<math") > 40 and "arithmatex" not in text
    plain = re.sub(r"<[^>]*>", "", text)
    assert "\\frac" not in plain and "$" not in plain.partition("The path")[2]


def test_the_reference_has_what_the_package_offers(site):
    import blip3o_fast

    text = "".join(page.read_text() for page in (site / "docs/reference").glob("*.html"))
    aliases = {name for name in blip3o_fast.__all__ if name.lower().startswith("create_improved")}
    for name in set(blip3o_fast.__all__) - aliases - {"generate", "ImprovedBLIP3oCLIPDiTModel"}:
        assert re.search(rf'id="blip3o_fast[\w.]*\.{name}"', text), name
