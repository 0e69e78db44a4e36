"""The command that adds packages to an installation leads to where the installation came from."""

import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest

from blip3o_fast.installation import FOLDER, install

PACKAGE = Path(__file__).parents[1] / "blip3o_fast"


@pytest.fixture
def came_from(monkeypatch):
    def note(direct_url):
        text = None if direct_url is None else json.dumps(direct_url)
        found = type("Found", (), {"read_text": lambda self, name: text})()
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)

    return note


@pytest.mark.parametrize(
    ("noted", "requirement"),
    [
        (
            {"url": "file:///home/me/my%20clone", "dir_info": {"editable": True}},
            ["--editable", "/home/me/my clone[plots]"],
        ),
        ({"url": "file:///home/me/clone", "dir_info": {}}, ["/home/me/clone[plots]"]),
        (
            {"url": "file:///tmp/b-0.1-py3-none-any.whl", "archive_info": {}},
            ["blip3o-fast[plots] @ file:///tmp/b-0.1-py3-none-any.whl"],
        ),
        (
            {"url": "https://example.org/b.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            ["blip3o-fast[plots] @ git+https://example.org/b.git@c0ffee"],
        ),
        (None, ["blip3o-fast[plots]"]),
    ],
    ids=["editable", "folder", "wheel", "git", "by-name"],
)
def test_the_command_names_the_origin(noted, requirement, came_from):
    came_from(noted)
    assert shlex.split(install("plots")) == ["pip", "install", *requirement]


def test_a_tree_that_is_not_installed(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert shlex.split(install("plots")) == ["pip", "install", f"{FOLDER}[plots]"]
    assert (FOLDER / "blip3o_fast" / "installation.py").is_file()


def test_nothing_else_words_such_a_command():
    named = re.compile(r"install[^\n]*blip3o-fast\[")
    files = set(PACKAGE.rglob("*.py")) - {PACKAGE / "installation.py"}
    assert [str(path) for path in files if named.search(path.read_text(encoding="utf-8"))] == []
