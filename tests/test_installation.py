"""The command that adds packages to an installation leads to where the installation came from."""

import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import pytest

from blip3o_fast import installation
from blip3o_fast.installation import install

PACKAGE = Path(__file__).parents[1] / "blip3o_fast"


@pytest.fixture
def came_from(monkeypatch):
    def note(direct_url):
        text = None if direct_url is None else json.dumps(direct_url)
        found = type("Found", (), {"read_text": lambda self, name: text})()
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
        monkeypatch.setattr(installation, "FOLDER", Path("/site-packages"))

    return note


@pytest.mark.parametrize(
    ("noted", "requirement"),
    [
        ({"url": "file:///home/me/a%20clone", "dir_info": {}}, "/home/me/a clone[plots]"),
        (
            {"url": "file:///tmp/b-0.1-py3-none-any.whl", "archive_info": {}},
            "blip3o-fast[plots] @ file:///tmp/b-0.1-py3-none-any.whl",
        ),
        (
            {"url": "https://example.org/b.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}},
            "blip3o-fast[plots] @ git+https://example.org/b.git@c0ffee",
        ),
        (None, "blip3o-fast[plots]"),
    ],
    ids=["folder", "wheel", "git", "by-name"],
)
def test_the_command_names_the_origin(noted, requirement, came_from):
    came_from(noted)
    assert shlex.split(install("plots")) == ["pip", "install", requirement]


def test_a_clone_is_named_whatever_is_installed():
    """Beside the sources lies metadata that does not say where they are."""
    root = Path(__file__).parents[1]
    assert shlex.split(install("plots")) == ["pip", "install", "--editable", f"{root}[plots]"]
    assert shlex.split(install()) == ["pip", "install", "--editable", str(root)]


def test_what_is_not_installed_at_all_is_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(installation, "FOLDER", Path("/somewhere"))
    assert install("plots") == "pip install 'blip3o-fast[plots]'"


def test_nothing_else_words_such_a_command():
    named = re.compile(r"install[^\n]*blip3o-fast\[")
    files = set(PACKAGE.rglob("*.py")) - {PACKAGE / "installation.py"}
    assert [str(path) for path in files if named.search(path.read_text(encoding="utf-8"))] == []
