"""Every code block of the documents: Python is run, shell is parsed by what it calls.

Networks are small, but tokens have the widths that the pages name, so blocks run as they stand.
"""

import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from small_data import write_shards
from torch.distributed.run import get_args_parser

from blip3o_fast import BLIP3oCLIPDiTConfig, BLIP3oCLIPDiTModel, BLIP3oDiT, DiTConfig
from blip3o_fast.cli import main as frame
from blip3o_fast.config import PRESETS
from blip3o_fast.flow import SOLVERS
from blip3o_fast.sampling import fit
from tests.packaging.building import load_script

ROOT = Path(__file__).parents[2]
PAGES = [path.as_posix() for path in load_script(ROOT / "docs/hooks.py").pages()]
FOLLOWED = {"CONTRIBUTING.md"}
"""Their Python is files of the library; ``tests/ops/test_contributing.py`` makes them."""
SMALL = {
    **{"hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 64},
    **{"num_attention_heads": 12, "num_key_value_heads": 4, "eva_adapter_layers": 1},
}
OTHERS = {"cp", "mkdir", "tail", "tar", "pytest"}
"""Programs that a block may call beside ours."""


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page):
    """Fenced blocks; one without a language is a picture in characters."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 2) for m in found]


PYTHON = [
    page
    for page in PAGES
    if page not in FOLLOWED and any(block.language == "python" for block in blocks(page))
]
COMMANDS = [
    pytest.param(command.partition("  #")[0], id=f"{page}:{block.line}-{number}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash"
    for number, command in enumerate(block.text.replace("\\\n", " ").splitlines(), 1)
    if command.strip()
]


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The files and the names that the pages take for granted."""
    for size in PRESETS:
        monkeypatch.setitem(PRESETS, size, SMALL)
    monkeypatch.setattr(fit, "REFERENCE_STEPS", 32)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = BLIP3oDiT(DiTConfig(**SMALL)).eval()
    for folder in ("my_model", "run"):
        model.save_pretrained(folder)
    published = BLIP3oCLIPDiTModel(BLIP3oCLIPDiTConfig(**SMALL)).eval()
    torch.save(published.state_dict(), "checkpoint_step_500.pt")
    for folder in ("shards", "clip"):
        write_shards(tmp_path / folder)
    (tmp_path / "photo.jpg").write_bytes(b"")
    eva = torch.randn(4, 256, 4096)
    yield {
        **{"model": model, "published_model": published, "eva": eva},
        **{"x": torch.randn(4, 256, 1024), "t": torch.rand(4)},
    }
    for name in SOLVERS.keys() - NAMES:
        del SOLVERS[name]


NAMES = set(SOLVERS)


def test_pages_have_blocks():
    assert {"README.md", "docs/solvers.md", "docs/guides/solver.md"} <= set(PYTHON)
    assert len(COMMANDS) > 30
    for page in PAGES:
        assert {block.language for block in blocks(page)} <= {"python", "bash", ""}, page


def test_readme_is_short_and_names_every_extra():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set(re.findall(r"`(\w[\w-]*)`", text.partition("| extra")[2].partition("\n\n")[0]))
    assert project["optional-dependencies"].keys() - {"images", "test", "dev"} == named


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page, given, monkeypatch):
    features = importlib.import_module("blip3o_fast.extraction.features")
    monkeypatch.setattr(features, "eva_tower", lambda *args, **options: None)
    monkeypatch.setattr(features, "wrap_eva", lambda tower, name: tower)
    monkeypatch.setattr(features, "extract_features", lambda images, *a, **o: given["eva"])
    for block in blocks(page):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, page, "exec"), given)
    if page == "docs/guides/solver.md":
        assert 0 < given["error"] < 0.01
    if "clip" in given:
        assert given["clip"].isfinite().all() and given["clip"].shape[1:] == (256, 1024)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line, monkeypatch):
    for part in re.split(r"\s*(?:;|&&|\|)\s*", line.partition(" > ")[0]):
        understand(shlex.split(part), monkeypatch)


def understand(words, monkeypatch):
    """Parse a command with its own parser, and fail if it would not take it."""
    while re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "torchrun":
        args = get_args_parser().parse_args(rest)
        assert args.module and args.training_script == "blip3o_fast"
        program, rest = "blip3o-fast", args.training_script_args
    elif program == "python" and rest[0] in ("train_dit.py", "eval_blip3o_coco.py"):
        command = {"train_dit.py": "train", "eval_blip3o_coco.py": "evaluate"}[rest[0]]
        program, rest = "blip3o-fast", [command, *rest[1:]]
    if program == "blip3o-fast":
        name = rest[0].replace("-", "_")
        module = importlib.import_module(f"blip3o_fast.cli.{name}")
        monkeypatch.setattr(module, "run", lambda args: 0)
        assert frame.main(rest) == 0
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[(.*?)\]", " ".join(rest)):
            assert set(extras.split(",")) <= known["optional-dependencies"].keys()
    elif program == "python":
        flags = {word for word in rest[1:] if word.startswith("--")}
        text = (ROOT / rest[0]).read_text()
        missing = [flag for flag in flags if flag not in text and flag[2:] not in text]
        assert not missing
    elif program.endswith(".sh"):
        assert (ROOT / program).is_file()
    else:
        assert program in OTHERS, f"{program} is no program that the pages may call"
