"""``blip3o-fast demo``: from photos to the report, a few steps long."""

import json
import sys

import pytest

from blip3o_fast.cli import demo as command
from blip3o_fast.cli.main import main
from blip3o_fast.demo import photos, pipeline


@pytest.mark.realdata
def test_photos_to_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "FITTED", (2, 3))
    monkeypatch.setattr(pipeline, "CONDITIONS", 4)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "intermediate_size": 32}
    monkeypatch.setattr(pipeline, "MODEL", {**pipeline.MODEL, **small})
    folder = tmp_path / "demo"
    words = ["demo", "--output_dir", str(folder), "--max_images", "3", "--steps", "2"]
    words += ["--max_samples", "4", "--evaluations", "1", "2", "--no_progress", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "ridge" in printed and "report.html" in printed
    found = json.loads((folder / "report" / "report.json").read_text())
    assert found["title"].startswith("EfficientNet-Lite2 to Lite0")
    assert [row["evaluations"] for row in found["fitted"]] == [2, 3]
    assert found["regression"] is None
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    # Everything is done already: the same command finds it so, and reports the same.
    assert main([*words, "--no_plots"]) == 0
    again = json.loads((folder / "report" / "report.json").read_text())
    assert again == found


def test_without_matplotlib_the_option_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(command, "find_photos", lambda options: [])
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 1
    err = capsys.readouterr().err
    assert "[plots]" in err and "--no_plots" in err


def test_a_bare_installation_is_told_one_extra(tmp_path, capsys, monkeypatch):
    """The one that brings photos and plots; it is not told plots first and photos then."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(photos, "PACKAGES", ())
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 1
    err = capsys.readouterr().err
    assert "[demo]" in err and "[plots]" not in err


@pytest.mark.parametrize(
    ("option", "message"),
    [("--steps", "steps: expected at least 1"), ("--max_samples", "max_samples: expected at")],
)
def test_bad_numbers(tmp_path, capsys, option, message):
    folder = tmp_path / "demo"
    assert main(["demo", "--output_dir", str(folder), option, "0"]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_without_images(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / "demo"
    assert main(["demo", "--images", str(tmp_path / "empty"), "--output_dir", str(folder)]) == 1
    assert "empty" in capsys.readouterr().err
    assert not folder.exists()
