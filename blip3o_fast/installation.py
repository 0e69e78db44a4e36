"""The command that adds packages to this very installation, for messages that ask for one.

The library is on no index, so a command must name what it was installed from: a folder, an archive
or a repository. ``pip`` notes that (PEP 610).
"""

import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "blip3o-fast"
FOLDER = Path(__file__).resolve().parents[1]


def install(extra: str = "") -> str:
    """``pip install`` of this package with an extra, ready to be pasted into a shell."""
    extra = f"[{extra}]" if extra else ""
    if (FOLDER / "pyproject.toml").is_file():  # a clone, installed or not
        return f"pip install --editable {shlex.quote(f'{FOLDER}{extra}')}"
    try:
        noted = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        noted = None
    return f"pip install {shlex.quote(_source(json.loads(noted) if noted else {}, extra))}"


def _source(noted: Mapping[str, Any], extra: str) -> str:
    """The requirement that leads to where the installation came from."""
    if "url" not in noted:  # an index or a folder of wheels
        return f"{NAME}{extra}"
    url = noted["url"]
    if "dir_info" in noted:
        return f"{url2pathname(urlsplit(url).path)}{extra}"
    if vcs := noted.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"{NAME}{extra} @ {url}"
