"""Checkpoints: round trip, published files, and what is wrong with a bad one."""

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import within

from blip3o_fast import BLIP3oDiT, DiTConfig, load_trained_model
from blip3o_fast.checkpoint import load_checkpoint
from blip3o_fast.config import PRESETS

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "eva_embedding_size": 10,
    "clip_embedding_size": 6,
    "eva_adapter_layers": 2,
    "zero_init_output": False,
    "initializer_range": 0.5,
}


SAVED = ["README.md", "config.json", "model.safetensors"]


def small(**fields):
    torch.manual_seed(0)
    return BLIP3oDiT(DiTConfig(**{**SMALL, **fields})).eval()


def outputs(model):
    torch.manual_seed(1)
    config = model.config
    x = torch.randn(1, config.num_tokens, config.clip_embedding_size)
    eva = torch.randn(1, config.num_tokens, config.eva_embedding_size)
    with torch.no_grad():
        return model(x, torch.tensor([0.3]), eva, return_dict=False)


def save_published(path, model, **extra):
    """The layout that the published trainer writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "global_step": 500,
        "best_eval_similarity": 0.8,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        "scheduler_state_dict": {"last_epoch": 500},
        "training_state": {"stability_alerts": 0},
        "normalization": "DISABLED",
        **extra,
    }
    torch.save(content, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"use_sandwich_norm": False}, {"use_eva_adapter": False}])
def test_round_trip(tmp_path, dtype, fields):
    model = small(**fields).to(dtype)
    model.save_pretrained(tmp_path / "model")
    again = BLIP3oDiT.from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b), name
    assert torch.equal(outputs(model.float()), outputs(again.float()))


def test_saving_leaves_nothing_else_behind(tmp_path):
    small().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == SAVED


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path):
    small().save_pretrained(tmp_path)
    weights, config = (tmp_path / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_a_failed_save_keeps_the_previous_model(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip3o_fast.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        small(initializer_range=0.1).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == SAVED


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(12, 4, 96), (16, 8, 128), (6, 2, 48), (8, 4, 64)]
)
def test_published_file_with_its_heads(tmp_path, heads, kv_heads, width):
    """Head counts cannot be read off the shapes: 16/8 at width 128 is also 8/4 at head width 16."""
    fields = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "conventions": "published",
    }
    model = small(**fields)
    save_published(tmp_path / "checkpoint_step_500.pt", model)
    loaded = load_trained_model(
        tmp_path / "checkpoint_step_500.pt",
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    assert loaded.config.conventions == "published"
    torch.testing.assert_close(outputs(loaded), outputs(model))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_left(tmp_path, prefix):
    model, path = small(conventions="published"), tmp_path / "checkpoint_step_1.pt"
    state = {f"{prefix}{name}": x for name, x in model.state_dict().items()}
    torch.save({"model_state_dict": state}, path)
    got = load_trained_model(path, num_attention_heads=4, num_key_value_heads=2)
    torch.testing.assert_close(outputs(got), outputs(model))


def test_published_large_keeps_its_sixteen_heads(tmp_path):
    """The shapes of large, one layer deep, with the recorded experiment beside the file."""
    preset = DiTConfig.preset("large").to_dict()
    model = small(
        **{k: preset[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")},
        num_hidden_layers=1,
        intermediate_size=64,
        conventions="published",
    )
    save_published(tmp_path / "checkpoint_step_500.pt", model)
    experiment = {"args": {"model_size": "large"}, "model_config": {"num_attention_heads": 16}}
    (tmp_path / "experiment_config.json").write_text(json.dumps(experiment))
    loaded = load_trained_model(tmp_path)
    assert loaded.config.num_attention_heads == 16 and loaded.config.num_key_value_heads == 8
    torch.testing.assert_close(outputs(loaded), outputs(model))


def test_the_heads_of_another_size_are_refused(tmp_path):
    """Their shapes are the same: tiny's 6 and 2 heads, and base's 12 and 4."""
    names = ("hidden_size", "num_hidden_layers", "intermediate_size")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    model = small(**{name: PRESETS["tiny"][name] for name in names}, **heads)
    file = tmp_path / "checkpoint_step_5.pt"
    save_published(file, model)
    assert load_trained_model(file, **heads).config.num_attention_heads == 6
    with pytest.raises(ValueError, match=r"expected 6 and 2 .* size tiny, got 12 and 4"):
        load_trained_model(file, num_attention_heads=12, num_key_value_heads=4)
    experiment = {"model_config": {"num_attention_heads": 12, "num_key_value_heads": 4}}
    (tmp_path / "experiment_config.json").write_text(json.dumps(experiment))
    assert load_trained_model(file).config.num_attention_heads == 12


def test_the_newest_published_file_of_a_folder_is_taken(tmp_path):
    old, new = small(), small(initializer_range=0.1)
    save_published(tmp_path / "checkpoint_step_900.pt", old)
    save_published(tmp_path / "checkpoint_step_1000.pt", new)
    loaded = load_trained_model(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    key = "input_proj.weight"
    assert torch.equal(loaded.state_dict()[key], new.state_dict()[key])


def test_head_counts_are_never_guessed(tmp_path):
    save_published(tmp_path / "checkpoint_step_500.pt", small())
    with pytest.raises(ValueError, match="head counts are not in the file; expected experiment_"):
        load_trained_model(tmp_path)


def test_pointer_files_are_followed(tmp_path):
    small().save_pretrained(tmp_path / "step_10")
    small(initializer_range=0.1).save_pretrained(tmp_path / "step_20")
    (tmp_path / "latest").write_text("step_20\n")
    assert load_trained_model(tmp_path).config.initializer_range == 0.1
    (tmp_path / "best").write_text("step_10\n")
    assert load_trained_model(tmp_path).config.initializer_range == 0.5
    assert load_trained_model(tmp_path / "latest").config.initializer_range == 0.1


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a folder, a \.pt file or a run's best"):
        load_trained_model(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", ""])
def test_pointers_stay_inside_the_run(tmp_path, name):
    (tmp_path / "latest").write_text(name)
    with pytest.raises(ValueError, match="latest: expected the name of a folder in the run"):
        load_trained_model(tmp_path)


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('payload ran')",))


def test_a_hostile_file_is_refused_and_not_run(tmp_path):
    path = tmp_path / "checkpoint_step_1.pt"
    torch.save({"model_state_dict": Payload()}, path)
    with pytest.raises(ValueError, match="expected model_state_dict of a BLIP3-o DiT"):
        load_trained_model(path, num_attention_heads=4, num_key_value_heads=2)
    path.write_bytes(pickle.dumps({"model_state_dict": Payload()}))
    with pytest.raises(ValueError, match="expected a weights-only torch file"):
        load_trained_model(path, num_attention_heads=4, num_key_value_heads=2)


def test_what_nobody_needs_does_not_refuse_the_file(tmp_path):
    """Not even a payload, which does not run."""
    model, path = small(conventions="published"), tmp_path / "checkpoint_step_1.pt"
    odd = {"args": argparse.Namespace(lr=0.1), "path": Path("a"), "tags": {1}, "class": Payload}
    save_published(path, model, hidden=Payload(), config=odd)
    got = load_trained_model(path, num_attention_heads=4, num_key_value_heads=2)
    torch.testing.assert_close(outputs(got), outputs(model))
    tensors = {**model.state_dict(), "pos_embed": Payload()}
    torch.save({"model_state_dict": tensors}, path)
    with pytest.raises(ValueError, match=r"step_1\.pt"):
        load_trained_model(path, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_truncated_weights(tmp_path, keep):
    small().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors: expected complete weights"):
        load_trained_model(tmp_path)


def test_checkpoint_of_another_size(tmp_path):
    small().save_pretrained(tmp_path)
    other = DiTConfig(**{**SMALL, "hidden_size": 48}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(other))
    expected = (
        r"pos_embed: expected \[1, 256, 48\] for a model of hidden_size 48.*got \[1, 256, 32\]"
    )
    with pytest.raises(ValueError, match=expected):
        load_trained_model(tmp_path)


def test_checkpoint_with_more_layers(tmp_path):
    small(num_hidden_layers=3).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small().config.to_dict()))
    with pytest.raises(ValueError, match=r"got \d+ more, such as blocks.2"):
        load_trained_model(tmp_path)


def test_unreadable_configuration(tmp_path):
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        load_trained_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 20_000_000}, "num_hidden_layers: expected at most"),
        ({"eva_adapter_layers": 20_000_000}, "eva_adapter_layers: expected at most"),
        ({"grid": [1, 1, 2_000_000_000], "num_tokens": 2_000_000_000}, "num_tokens: expected at"),
        ({"hidden_size": 4 * 10**30}, "hidden_size: expected at most"),
        (
            {"grid": [1, "16", 16]},
            r"config.json: expected the configuration of a model \(grid: expected",
        ),
        ({"grid": {}}, "config.json"),
        ({"conventions": []}, "config.json"),
        ({"training_mode": {"a": 1}}, "config.json"),
        ({"rope_theta": "much"}, "config.json"),
    ],
)
def test_a_configuration_that_its_weights_do_not_fit(tmp_path, change, message):
    """Found before a model of that size is built."""
    model = small()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), **change}))
    with within(seconds=5, megabytes=50), pytest.raises(ValueError, match=message):
        load_trained_model(tmp_path)


@pytest.mark.parametrize("text", ["[" * 2000 + "]" * 2000, '{"a": ' * 2000, '{"rope_theta": NaN}'])
def test_json_that_is_deep_or_none(tmp_path, text):
    small().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        load_trained_model(tmp_path)


@pytest.mark.parametrize(
    "experiment", ["[]", '{"args": 3}', '{"model_config": [1]}', '{"args": {"model_size": []}}']
)
def test_experiments_that_are_something_else(tmp_path, experiment):
    save_published(tmp_path / "checkpoint_step_1.pt", small())
    (tmp_path / "experiment_config.json").write_text(experiment)
    with pytest.raises(ValueError, match="experiment_config"):
        load_trained_model(tmp_path)


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_of_numpy_beside_the_weights(tmp_path, legacy):
    model = small(conventions="published")
    path = tmp_path / "checkpoint_step_1.pt"
    numbers = [np.float64(0.5), np.float32(2), np.int64(-3), np.bool_(True)]
    content = {"model_state_dict": model.state_dict(), "metrics": numbers}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    torch.testing.assert_close(outputs(load_trained_model(path, **HEADS)), outputs(model))
    content["metrics"] = np.array(["x"], dtype=object)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if not legacy:
        torch.testing.assert_close(outputs(load_trained_model(path, **HEADS)), outputs(model))
        return
    with pytest.raises(ValueError, match=r"step_1.pt: expected a weights-only torch file") as error:
        load_trained_model(path, **HEADS)
    assert "\n" not in str(error.value)


def test_a_tensor_that_claims_more_than_its_file(tmp_path):
    tensors = small(conventions="published").state_dict()
    tensors["input_proj.weight"] = torch.zeros(1, 1).expand(1 << 20, 1 << 20)
    path = tmp_path / "checkpoint_step_1.pt"
    torch.save({"model_state_dict": tensors}, path)
    with within(seconds=5, megabytes=50), pytest.raises(ValueError, match=r"step_1\.pt: expected"):
        load_trained_model(path, **HEADS)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_loaded_model_owns_its_memory(tmp_path, kind):
    model = small(conventions="published")
    if kind == "pt":
        path = tmp_path / "checkpoint_step_1.pt"
        save_published(path, model)
        loaded = load_trained_model(path, **HEADS)
    else:
        path = tmp_path / "model.safetensors"
        model.save_pretrained(tmp_path)
        loaded = load_trained_model(tmp_path)
    with path.open("r+b") as file:  # in place, as cp and rsync --inplace do
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(10)
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"expected config.json, a pointer file"):
        load_checkpoint(tmp_path)
