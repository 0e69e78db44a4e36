"""``blip3o-fast fit-solver``: a table of errors, and solvers that ``generate`` finds."""

import json
import re

import pytest
import torch
from small_data import E, small_model, write_shards

from blip3o_fast import load_trained_model
from blip3o_fast.cli import fit_solver
from blip3o_fast.cli.main import main
from blip3o_fast.model_card import CARD_NAME


@pytest.fixture
def command(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    write_shards(tmp_path / "shards")
    return [
        *("fit-solver", "--model_path", str(tmp_path / "model")),
        *("--embeddings_dir", str(tmp_path / "shards"), "--device", "cpu", "--conditions", "8"),
    ]


def test_fits_prints_and_writes(command, tmp_path, capsys):
    assert main([*command, "--evaluations", "4", "2"]) == 0
    printed, progress = capsys.readouterr()
    rows = [line.split() for line in printed.splitlines()[:3]]
    assert rows[0] == ["evaluations", "fitted", "heun", "adams_bashforth2", "adams_bashforth4"]
    assert [row[0] for row in rows[1:]] == ["2", "4"]
    for row in rows[1:]:
        fitted, *others = map(float, row[1:])
        assert fitted < min(others)
    told = re.findall(r"^(\w+): (\d+)/(\d+) evaluations", progress, re.MULTILINE)
    fitting, measuring = 8 * 256 + 6 * (8 * 6 + 8), 2 * (256 + 4 * 6)
    last = {name: (int(done), int(total)) for name, done, total in told}
    assert last == {"fit": (fitting, fitting), "measure": (measuring, measuring)}
    written = json.loads((tmp_path / "model" / "solver.json").read_text())
    assert [len(solver["labels"]) for solver in written["solvers"]] == [2, 4]
    model = load_trained_model(tmp_path / "model")
    assert sorted(model.fitted) == [2, 4]
    assert model.generate(torch.randn(1, 6, E), 4, solver="fitted").isfinite().all()


def test_what_was_fitted_is_kept_if_the_table_is_interrupted(command, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_solver, "solver_errors", interrupt)
    assert main([*command, "--evaluations", "2"]) == 130
    assert sorted(load_trained_model(tmp_path / "model").fitted) == [2]


def test_a_second_fit_keeps_the_first(command, tmp_path):
    assert main([*command, "--evaluations", "2"]) == 0
    assert main([*command, "--evaluations", "3"]) == 0
    assert sorted(load_trained_model(tmp_path / "model").fitted) == [2, 3]
    listed = (tmp_path / "model" / CARD_NAME).read_text().partition("## Fitted solvers")[2]
    assert re.findall(r"^\| (\d+) \|", listed, re.MULTILINE) == ["2", "3"], "as the card says"


def test_generate_uses_it(command, tmp_path, capsys):
    assert main([*command, "--evaluations", "3"]) == 0
    generate = [
        *("generate", "--model_path", str(tmp_path / "model"), "--solver", "fitted"),
        *("--embeddings_dir", str(tmp_path / "shards"), "--output_dir", str(tmp_path / "clip")),
        *("--no_progress", "--device", "cpu"),
    ]
    assert main([*generate, "--num_inference_steps", "3"]) == 0
    assert main([*generate, "--num_inference_steps", "5", "--output_dir", str(tmp_path / "x")]) == 2
    assert main([*command, "--evaluations", "3", "--seed", "1"]) == 0
    assert main([*generate, "--num_inference_steps", "3"]) == 1
    assert "solver" in capsys.readouterr().err, "half of a folder by another solver"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conditions", "100"], "conditions: expected at most the 20 training samples of"),
        (["--conditions", "3"], "eva: expected at least 4 conditions, got 3"),
        (["--evaluations", "0"], "evaluations: expected at least 1"),
    ],
)
def test_bad_arguments(command, capsys, arguments, message):
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
