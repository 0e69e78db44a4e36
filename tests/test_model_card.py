"""The card beside a model says what is known, what is not, and nothing else."""

import json
import sys
import types
from pathlib import Path

import pytest
from small_data import small_model, small_report, write_shards

from blip3o_fast import FittedSolver
from blip3o_fast.data import Encoder
from blip3o_fast.model_card import CARD_NAME, refresh_solvers


def solver(count=2):
    rows = tuple((1.0,) * (n + 1) for n in range(count))
    return FittedSolver(
        **{"labels": (0.0,) * count, "lengths": (1 / count,) * count, "states": (1.0,) * count},
        **{"slopes": rows, "clamp": None, "guidance_scale": 2.0, "conventions": "consistent"},
        **{"weights": "a", "dtype": "fp32", "reference": "heun, 256 evaluations"},
        **{"conditions": (3, 1), "error": 0.0123, "fitted_error": 0.01},
    )


def test_what_nobody_told_is_not_recorded(tmp_path):
    model = small_model(simple_scale_factor=0.5)
    model.save_pretrained(tmp_path)
    card = (tmp_path / CARD_NAME).read_text()
    assert card.startswith("---\nlibrary_name: blip3o_fast\n")
    assert "| conventions | consistent:" in card
    assert f"| parameters | {model.get_num_parameters():,} |" in card
    assert "[B, 6, 10] -> [B, 6, 6]" in card and "| targets multiplied by | 0.5;" in card
    assert "| source encoder | not recorded |" in card and "| data | not recorded |" in card
    assert "Not recorded: `blip3o-fast evaluate`" in card and "None. `blip3o-fast fit" in card


def test_encoders_data_results_and_solvers(tmp_path):
    towers = {
        "eva_encoder": Encoder("BAAI/EVA | <b>", "abc", "last layer"),
        "clip_encoder": Encoder("openai/clip\nfake"),
    }
    write_shards(tmp_path / "shards", **towers)
    (tmp_path / "report.json").write_text(json.dumps(small_report()))
    model = small_model(condition_dropout=0.1)
    model.fitted = {2: solver()}
    model.save_pretrained(tmp_path, shards=tmp_path / "shards", report=tmp_path / "report.json")
    card = (tmp_path / CARD_NAME).read_text()
    assert "| source encoder | BAAI/EVA / &lt;b>, abc, last layer |" in card
    assert "| target encoder | openai/clip fake |" in card
    assert "| data | 24 samples, 30% of photos held out |" in card
    assert "| guidance | condition dropped with probability 0.1 |" in card
    rows = card.splitlines()
    assert "| mean predictor | 0.250 [0.150, 0.350] | 0.250 | 0.250 | 0.250 | 7 |" in rows
    assert "| 1 evaluation | 0.750 [0.650, 0.850] | 0.750 | 0.750 | 0.750 | 7 |" in rows
    assert "| 5 evaluations, fitted | 0.625 [0.525, 0.725] | 0.625 | 0.625 | 0.625 | 7 |" in rows
    assert "| 2 | 0.012 | 2 | heun, 256 evaluations |" in rows


def test_a_card_of_ones_own_is_kept(tmp_path):
    small_model().save_pretrained(tmp_path)
    written = (tmp_path / CARD_NAME).read_text()
    small_model(simple_scale_factor=3.0).save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).read_text() != written, "ours is brought up to date"
    (tmp_path / CARD_NAME).write_text("# My model\n")
    small_model().save_pretrained(tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == "# My model\n"


def test_new_solvers_change_their_section_only(tmp_path):
    write_shards(tmp_path / "shards")
    model = small_model()
    model.save_pretrained(tmp_path, shards=tmp_path / "shards")
    before = (tmp_path / CARD_NAME).read_text()
    refresh_solvers(tmp_path, {2: solver()})
    after = (tmp_path / CARD_NAME).read_text()
    model.fitted = {2: solver()}
    model.save_pretrained(tmp_path, shards=tmp_path / "shards")
    assert before != after == (tmp_path / CARD_NAME).read_text()


def test_new_solvers_leave_a_card_of_ones_own(tmp_path):
    refresh_solvers(tmp_path, {2: solver()})
    assert not (tmp_path / CARD_NAME).exists()
    (tmp_path / CARD_NAME).write_text("# Mine\n\n## Fitted solvers\n\nTwo.\n")
    refresh_solvers(tmp_path, {2: solver()})
    assert (tmp_path / CARD_NAME).read_text().endswith("\nTwo.\n")


def test_what_is_named_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="manifest"):
        small_model().save_pretrained(tmp_path / "a", shards=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"report\.json"):
        small_model().save_pretrained(tmp_path / "b", report=tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"dit": []}')
    with pytest.raises(ValueError, match=r"report\.json: expected the report\.json of an eval"):
        small_model().save_pretrained(tmp_path / "c", report=tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing was written"


def test_push_to_hub_sends_the_card(tmp_path, monkeypatch):
    sent = {}

    class Api:
        def create_repo(self, name, *, private, exist_ok):
            assert (name, private, exist_ok) == ("me/model", True, True)

        def upload_folder(self, *, repo_id, folder_path):
            sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return "address"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    (tmp_path / "report.json").write_text(json.dumps(small_report()))
    assert small_model().push_to_hub("me/model", report=tmp_path / "report.json") == "address"
    assert sent.keys() == {"config.json", "model.safetensors", CARD_NAME}
    assert b"| ridge | 0.500" in sent[CARD_NAME]
