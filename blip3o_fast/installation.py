"""The command that adds packages to this very installation, for messages that ask for one.

The library is on no index, so a command must name what it was installed from: a folder, an archive
or a repository. ``pip`` notes that (PEP 610).
"""

import importlib.metadata
import json
import shlex
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "blip3o-fast"
FOLDER = Path(__file__).resolve().parents[1]


def install(extra: str = "") -> str:
    """``pip install`` of this package with an extra, ready to be pasted into a shell."""
    extra = f"[{extra}]" if extra else ""
    try:
        noted = importlib.metadata.distribution(NAME).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return f"pip install {shlex.quote(f'{FOLDER}{extra}')}"
    return f"pip install {_source(json.loads(noted) if noted else {}, extra)}"


def _source(noted: dict, extra: str) -> str:
    """The requirement that leads to where the installation came from."""
    url = noted.get("url")
    if url is None:  # from an index or a folder of wheels, by name
        return shlex.quote(f"{NAME}{extra}")
    if "dir_info" in noted:
        editable = "--editable " if noted["dir_info"].get("editable") else ""
        return editable + shlex.quote(f"{url2pathname(urlsplit(url).path)}{extra}")
    if vcs := noted.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return shlex.quote(f"{NAME}{extra} @ {url}")
