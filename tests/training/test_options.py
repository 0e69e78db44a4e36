"""The record of options: types, ranges, files, and what may change on resume."""

import dataclasses
import json
import re

import pytest

from blip3o_fast.errors import OptionError
from blip3o_fast.flags import help_texts
from blip3o_fast.options.train import FREE, TrainingOptions, read_options_file

PUBLISHED_DEFAULTS = {
    "model_size": "base",
    "training_mode": "patch_only",
    "learning_rate": 1e-4,
    "batch_size": 8,
    "num_epochs": 10,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "velocity_weight": 1.0,
    "semantic_weight": 0.5,
    "cosine_weight": 0.2,
    "consistency_weight": 0.3,
    "simple_scale_factor": 1.0,
    "eval_every_n_steps": 50,
    "eval_num_samples": 100,
    "eval_inference_steps": 50,
    "use_heun_inference": True,
    "max_shards": None,
    "use_eva_adapter": True,
    "eva_adapter_layers": 6,
}


def test_published_names_keep_their_defaults(options):
    plain = TrainingOptions("data", "run")
    assert {name: getattr(plain, name) for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


@pytest.mark.parametrize("field", dataclasses.fields(TrainingOptions), ids=lambda f: f.name)
def test_every_option_has_help_and_survives_json(field, options):
    groups = [group for group in help_texts(TrainingOptions).values() if field.name in group]
    assert len(groups) == 1 and len(groups[0][field.name]) > 5
    stored = json.loads(json.dumps(options(grid=(1, 2, 3)).to_dict()))
    restored = TrainingOptions.from_dict(stored)
    assert getattr(restored, field.name) == getattr(options(grid=(1, 2, 3)), field.name)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "at least 1"),
        ("batch_size", 2.5, "an integer"),
        ("batch_size", True, "an integer"),
        ("learning_rate", 0.0, "more than 0"),
        ("learning_rate", -1e-4, "more than 0"),
        ("learning_rate", float("nan"), "a number"),
        ("velocity_weight", -1.0, "at least 0"),
        ("consistency_weight", -0.1, "at least 0"),
        ("simple_scale_factor", 0.0, "more than 0"),
        ("simple_scale_factor", "much", "a number or auto"),
        ("ema_decay", 1.0, "at least 0 and below 1"),
        ("condition_dropout", 1.5, "below 1"),
        ("condition_dropout", 1.0, "below 1"),
        ("zero_time_fraction", 1.01, "at least 0 and at most 1"),
        ("zero_time_fraction", -0.1, "at least 0 and at most 1"),
        ("heldout_fraction", 1.0, "below 1"),
        ("seed", -1, "at least 0"),
        ("model_size", "huge", "tiny, small, base, large"),
        ("grid", (1, 2), "a list of 3 int or none"),
        ("fp16", 1, "true or false"),
        ("precision", "bf16", "fp16"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(name, value, expected, options):
    flags = {"fp16": True} if name == "precision" else {}
    with pytest.raises(OptionError, match=rf"^{name}: expected .*{re.escape(expected)}"):
        options(**{name: value, **flags})


def test_unknown_options_are_refused_with_the_nearest_name(options):
    with pytest.raises(OptionError, match=r"'batchsize'.*did you mean 'batch_size'"):
        options().replace(batchsize=1)
    with pytest.raises(OptionError, match="unknown option"):
        options().replace(zzz=1)
    with pytest.raises(OptionError, match="options: missing output_dir"):
        TrainingOptions.from_dict({"chunked_embeddings_dir": "data"})


def test_files_of_options(tmp_path):
    (tmp_path / "a.json").write_text('{"batch_size": 3, "grid": [1, 2, 3]}')
    (tmp_path / "a.toml").write_text('batch_size = 3\nmodel_size = "tiny"\n')
    assert read_options_file(tmp_path / "a.json") == {"batch_size": 3, "grid": [1, 2, 3]}
    assert read_options_file(tmp_path / "a.toml") == {"batch_size": 3, "model_size": "tiny"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "JSON or TOML"), ("[1]", "an object"), ('{"x": 1}', "unknown")],
)
def test_a_bad_file_of_options_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=message):
        read_options_file(path)


def test_only_what_alters_the_run_counts_as_a_change(options):
    saved = json.loads(json.dumps(options().to_dict()))
    free = {"keep_last": 9, "num_workers": 1, "gradient_accumulation_steps": 2, "compile": True}
    assert options(**free, output_dir="elsewhere").changes(saved) == {}
    old = {name: value for name, value in saved.items() if name != "zero_time_fraction"}
    assert options().changes(old) == {}, "a run from before an option was added goes on"
    assert options(zero_time_fraction=0.5).changes(old) == {"zero_time_fraction": (0.0, 0.5)}
    changed = options(learning_rate=0.5, grid=(1, 2, 3)).changes(saved)
    assert changed == {"learning_rate": (1e-2, 0.5), "grid": (None, [1, 2, 3])}


def test_what_is_free_to_change_exists():
    assert {field.name for field in dataclasses.fields(TrainingOptions)} >= FREE
