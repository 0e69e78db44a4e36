"""Many training steps in a row: counted, and judged by the exit status."""

import json
from dataclasses import replace

import long_training as long
import pytest
from safetensors.torch import load_file

from blip3o_fast.benchmarking.shapes import Shape

WORDS = ("--device", "cpu", "--preset", "tiny", "--batch", "2", "--samples", "8", "--steps", "6")


def test_steps_are_counted(narrow, tmp_path, capsys):
    file = tmp_path / "long.json"
    assert long.main([*WORDS, "--precision", "fp32", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["steps"] == 6 and content["skipped"] == 0
    assert content["seconds"] > 0 and content["peak"] is None
    assert "6 training steps of tiny-b2 in fp32" in capsys.readouterr().out


def test_a_step_that_met_nan_is_a_failure(monkeypatch, narrow, capsys):
    take_steps = long.take_steps

    def with_one_skipped(shape, args):
        first, *rest = take_steps(shape, args)
        return [replace(first, skipped=True, loss=None), *rest]

    monkeypatch.setattr(long, "take_steps", with_one_skipped)
    assert long.main([*WORDS, "--precision", "fp32"]) == 1
    assert "1 with NaN or Inf" in capsys.readouterr().out


def test_embeddings_have_the_deviations_asked_for(tmp_path, narrow):
    config = Shape("tiny", 2, 16).config
    long.write_shards(tmp_path, config, 8, held_out=0, scales=(3.0, 0.5))
    (file,) = tmp_path.glob("*.safetensors")
    towers = load_file(file)
    assert towers["eva"].float().std() == pytest.approx(3.0, rel=0.05)
    assert towers["clip"].float().std() == pytest.approx(0.5, rel=0.05)
