import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from blip3o_fast.evaluation import output, write_report
from blip3o_fast.report.style import LIGHT

TEXTS = {"report.html", "report.json", "samples.csv"}


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new" / "report"
    assert write_report(report, folder) == folder / "report.html"
    return folder


def test_files(folder, drawn):
    assert {path.name for path in folder.iterdir()} == TEXTS | set(drawn[LIGHT])
    for path in folder.glob("*.png"):
        Image.open(path).verify()


def test_json_holds_the_report(report, folder):
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()


def test_csv_has_a_row_a_sample(report, folder):
    with (folder / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == list(report.mean.scores.keys)
    assert [row["source"] for row in rows] == list(report.mean.scores.sources)
    methods = {"mean": report.mean, "ridge": report.ridge, "dit_10": report.dit[3]}
    for method, result in methods.items():
        for name in ("token_cosine", "image_cosine", "centred_cosine", "mse"):
            got = [float(row[f"{method}_{name}"]) for row in rows]
            half_a_digit = 0.5e-5  # of six, written after a leading 1
            np.testing.assert_allclose(got, getattr(result.scores, name), rtol=half_a_digit)
    assert len(rows[0]) == 2 + 4 * (2 + len(report.dit))


def test_names_that_would_act_are_escaped(report, tmp_path):
    keys = ("=cmd|' /C calc'!A0", "a\rb\x1b[2J", "\ud800", *report.mean.scores.keys[3:])

    def renamed(result):
        return dataclasses.replace(result, scores=dataclasses.replace(result.scores, keys=keys))

    dit = tuple(map(renamed, report.dit))
    methods = {"mean": renamed(report.mean), "ridge": renamed(report.ridge), "dit": dit}
    write_report(dataclasses.replace(report, **methods), tmp_path, plots=False)
    with (tmp_path / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows[:3]] == ["'=cmd|' /C calc'!A0", "a\\rb\\x1b[2J", "\\ud800"]
    assert len(rows) == len(keys)


def test_writing_again_gives_the_same_bytes(report, folder, tmp_path):
    write_report(report, tmp_path)
    for name in (path.name for path in folder.iterdir()):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_failure_leaves_the_folder_as_it_was(report, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")

    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(output, "draw_plots", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        write_report(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_matplotlib_is_needed_for_plots_alone(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"\[plots\]"):
        write_report(report, tmp_path / "with")
    assert not (tmp_path / "with").exists()
    write_report(report, tmp_path / "without", plots=False)
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == TEXTS


def test_importing_evaluation_loads_no_extra():
    code = (
        "import sys, blip3o_fast.evaluation\n"
        "print([m for m in ('matplotlib', 'PIL', 'triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
