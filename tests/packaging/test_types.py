"""``py.typed`` is kept: a strict checker sees the types of an installed wheel."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.building import (
    HIDDEN,
    clean_environment,
    copy_sources,
    environment,
    hook,
    pip,
    share_installed,
)

pytest.importorskip("setuptools", minversion="77")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).with_name("user_program.py")


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """A function from a program's text to what pyright finds in it."""
    pytest.importorskip("pyright")
    folder = tmp_path_factory.mktemp("typed")
    built = hook(copy_sources(folder / "tree"), "build_wheel", str(folder), **HIDDEN)
    assert built.returncode == 0, built.stderr
    python = clean_environment(folder / "env")
    share_installed(folder / "env")
    (wheel,) = folder.glob("*.whl")
    assert pip(python, "install", str(wheel)).returncode == 0
    home = folder / "home"
    home.mkdir()
    settings = {"typeCheckingMode": "strict", "pythonVersion": "3.11"}
    (home / "pyrightconfig.json").write_text(json.dumps(settings))
    shutil.rmtree(folder / "tree")

    def found(text):
        (home / "program.py").write_text(text)
        words = ["-m", "pyright", "--outputjson", "--pythonpath", python]
        done = subprocess.run(
            [sys.executable, *words], cwd=home, env=environment(), capture_output=True, text=True
        )
        return [one["message"] for one in json.loads(done.stdout)["generalDiagnostics"]]

    return found


def test_a_users_program_passes(check):
    assert check(PROGRAM.read_text()) == []


def test_a_users_mistakes_are_found(check):
    wrong = [
        "model.generate(eva, num_steps=3)",
        'SamplingPlan(model, steps="3")',
        'train(TrainingOptions(chunked_embeddings_dir="a", output_dir="b", batch_size="4"))',
    ]
    lines = PROGRAM.read_text() + "\n\ndef wrong(model: BLIP3oDiT, eva: Tensor) -> None:\n"
    messages = check(lines + "".join(f"    {line}\n" for line in wrong))
    for name in ("num_steps", '"steps"', '"batch_size"'):
        assert any(name in message for message in messages), messages
