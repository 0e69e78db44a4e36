"""The workflow files call what is there, and say nothing of where packages come from."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def test_each_has_its_file():
    assert [path.stem for path in WORKFLOWS] == ["docs", "tests", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_they_call_targets_of_make(path):
    text = path.read_text()
    workflow = yaml.safe_load(text)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = [step["run"] for step in steps if step.get("run", "").startswith("make ")]
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert called and {line.split()[1] for line in called} <= targets
    assert "//" not in text, "a host"
    assert workflow["permissions"] == {"contents": "read"}
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4"))


def test_targets_are_documented_and_phony():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert targets == set(phony.split())
    assert targets == set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
