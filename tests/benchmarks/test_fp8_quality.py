"""The quality table of FP8 on a small model: what it must say whatever the machine."""

import json
import sys

import fp8_quality
import pytest
import torch
from golden_data import relative_error
from small_data import small_model, write_shards

from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.evaluation.evaluate import read_batches
from blip3o_fast.flow import interpolate


def trained():
    """A model in which nothing is zero or one, as after training."""
    model = small_model()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def given(tmp_path):
    trained().save_pretrained(tmp_path / "model")
    write_shards(tmp_path / "shards")
    return tmp_path


def test_the_table(given, monkeypatch, capsys):
    arguments = [
        *("fp8_quality", "--model_path", str(given / "model")),
        *("--embeddings_dir", str(given / "shards"), "--device", "cpu"),
        *("--evaluations", "1", "4", "--times", "0.2", "0.8", "--batch_size", "3"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    fp8_quality.main()
    *table, line = capsys.readouterr().out.splitlines()
    facts = json.loads(line)
    assert facts["fp8"].startswith("emulation (") and facts["samples"] >= facts["sources"] > 1
    assert len(table) == 2 + 6 and all(row.count("|") == 5 for row in table)
    by = {(row["measure"], row["at"]): row for row in facts["rows"]}
    for time in (0.2, 0.8):
        row = by["velocity error", time]
        assert 1e-4 < row["bf16"] < row["fp8"] < 0.2
    for count in (1, 4):
        row = by["cosine to fp32", count]
        assert row["fp32"] == pytest.approx(1) and 0.9 < row["fp8"] < row["bf16"] < 1
        target = by["cosine to target", count]
        assert abs(target["fp8"] - target["fp32"]) < 0.1 and target["fp32"] < 0.99


def test_the_velocity_is_the_models(given):
    model = trained()
    data = EmbeddingDataset(given / "shards", split="heldout")
    (batch,) = read_batches(data, range(len(data)), len(data), torch.device("cpu"), None)
    noise = fp8_quality.noise_of(batch, 0)
    t = torch.full((len(noise),), 0.3)
    state = interpolate(batch.clip.float(), noise, t)
    with torch.no_grad():
        got = fp8_quality.velocity(model, torch.float32, None, batch, state, 0.3)
        expected = model(state, t, batch.eva, return_dict=False)
    assert relative_error(got, expected) < 2e-6
