"""Whatever cannot work is refused by name before the first step, and leaves nothing behind."""

import json
import math
import re
import shutil

import pytest
from small_data import small_model, write_shards

from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.errors import OptionError
from blip3o_fast.processes import World
from blip3o_fast.training import train
from blip3o_fast.training.run import locked
from blip3o_fast.training.run_plan import make_plan


def manifest_edit(**changes):
    def edit(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def truncate(folder):
    shard = folder / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])


def widen(folder):
    manifest_edit(eva_width=11)(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "no manifest"),
        (lambda folder: (folder / "shard_00001.safetensors").unlink(), "shard_00001"),
        (truncate, "shard_00001"),
        (widen, "shard"),
        (manifest_edit(samples=7), "samples"),
        (manifest_edit(tokens=7), "tokens"),
    ],
)
def test_bad_data_is_named(damage, message, options, tmp_path):
    folder = write_shards(tmp_path / "data")
    damage(folder)
    refused(options(chunked_embeddings_dir=folder), f"^chunked_embeddings_dir: .*{message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eva_embedding_size": 4096}, "eva_embedding_size: expected 10, as in the data, got 4096"),
        ({"clip_embedding_size": 7}, "clip_embedding_size: expected 6"),
        ({"grid": (1, 3, 2)}, "grid: expected (1, 2, 3)"),
        ({"heldout_fraction": 0.0}, "chunked_embeddings_dir: .*expected heldout samples, got none"),
        ({"batch_size": 23}, "batch_size: expected at most 20, the training samples, got 23"),
        ({"warmup_steps": 6}, "warmup_steps: expected fewer than 6"),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps: expected at most 4"),
        ({"hidden_size": 18}, "hidden_size: expected num_attention_heads"),
        ({"parallel": "ddp"}, "parallel: ddp expects torchrun"),
        ({"parallel": "fsdp", "compile": True}, "expects torchrun"),
        ({"init_from": "nowhere"}, "init_from: nowhere"),
        ({"optimizer": "apex"}, "optimizer: apex expects"),
        ({"use_wandb": True}, "use_wandb: expected wandb.*[logging]"),
    ],
)
def test_bad_options_are_named(changes, message, options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    escaped = ".*".join(map(re.escape, message.split(".*")))
    refused(options(**changes), escaped)


def test_cuda_without_a_device_is_refused(options, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refused(options(device="cuda"), "device: expected one of the 0 CUDA devices")


def test_batches_must_divide_among_the_processes(options):
    with pytest.raises(OptionError, match="batch_size: expected a multiple of the 3 processes"):
        make_plan(options(), World(0, 3))


def test_a_foreign_folder_is_left_alone(options):
    folder = options().output_dir
    tree(folder, {"thesis.tex": "do not touch"})
    refused(options(), "expected an empty folder or a run, got files in", left=["thesis.tex"])


def test_a_file_in_place_of_the_folder(options, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="expected a folder, got the file"):
        train(options(output_dir=tmp_path / "file"))


def test_another_run_is_named_with_what_differs(options, tmp_path):
    train(options())
    with pytest.raises(OptionError, match=r"learning_rate was 0.01, is 0.5"):
        train(options(learning_rate=0.5))
    with pytest.raises(OptionError, match="holds a run; expected a new folder, or resume"):
        train(options(resume=False))
    other = write_shards(tmp_path / "other", samples=25)
    with pytest.raises(OptionError, match="other data or another split"):
        train(options(chunked_embeddings_dir=other))


def test_a_folder_in_use_is_refused(options):
    folder = train(options()).folder
    with locked(folder), pytest.raises(OptionError, match="another process does; wait for it"):
        train(options())
    assert train(options()).steps == 6


def test_a_shard_that_was_replaced_is_named(options, tmp_path):
    """By one of the same size, beside the manifest as it was."""
    folder = write_shards(tmp_path / "data")
    chosen = options(chunked_embeddings_dir=folder)
    train(chosen)
    path = folder / "shard_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for where in (chosen.output_dir, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"shard_00001\.safetensors: corrupted or replaced"):
            train(chosen.replace(output_dir=str(where)))
    assert not (tmp_path / "new" / "step_2").exists()


def test_data_that_has_moved_is_the_same_data(options, shards, tmp_path):
    train(options())
    shutil.copytree(shards, tmp_path / "moved")
    assert train(options(chunked_embeddings_dir=tmp_path / "moved")).steps == 6


def test_a_damaged_run_is_named(options):
    result = train(options())
    weights = result.folder / "step_6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(OptionError, match="damaged step_6; delete them"):
        train(options())
    (result.folder / "options.json").write_text("{")
    with pytest.raises(OptionError, match=r"options.json is damaged"):
        train(options())


def test_a_row_of_nan_is_named_by_shard_and_key(options, tmp_path):
    folder = write_shards(tmp_path / "data")
    data = EmbeddingDataset(folder, split="train")
    key = data.records([3])[0].key
    poison(folder, key)
    with pytest.raises(ValueError, match=rf"shard_0000\d.*'?{key}'?") as failure:
        train(options(chunked_embeddings_dir=folder, max_steps=10))
    assert not isinstance(failure.value, OptionError)


def test_automatic_scale_gives_targets_unit_deviation(options):
    plan = make_plan(options(simple_scale_factor="auto"), World())
    targets = plan.train.read(range(len(plan.train))).clip.double()
    deviation = math.sqrt(float(targets.var(correction=0)))
    assert plan.config.simple_scale_factor == pytest.approx(1 / deviation, rel=1e-6)


def test_sizes_come_from_preset_options_and_data(options):
    plan = make_plan(options(hidden_size=None, num_hidden_layers=3, model_size="tiny"), World())
    config = plan.config
    assert (config.hidden_size, config.num_hidden_layers) == (384, 3)
    assert (config.eva_embedding_size, config.clip_embedding_size) == (10, 6)
    assert (config.grid, config.num_tokens) == ((1, 2, 3), 6)


def test_a_stand_in_for_cls_by_training_mode(options):
    plan = make_plan(options(training_mode="cls_patch"), World())
    assert plan.config.num_tokens == 7 and plan.train.cls == "token_mean"
    assert train(options(training_mode="cls_patch")).steps == 6


def test_epochs_and_warmup_make_the_schedule(options):
    plan = make_plan(options(max_steps=None, num_epochs=5), World())
    assert plan.steps_per_epoch == len(plan.train) // 4
    assert plan.total_steps == 5 * plan.steps_per_epoch
    assert plan.schedule.warmup == plan.total_steps // 10
    assert make_plan(options(max_steps=5000), World()).schedule.warmup == 100


def test_starting_from_a_checkpoint(options, tmp_path):
    small_model().save_pretrained(tmp_path / "start")
    chosen = options(init_from=tmp_path / "start", learning_rate=1e-9, hidden_size=None)
    plan = make_plan(chosen, World())
    assert plan.config.hidden_size == 16 and plan.initial is not None
    refused(options(init_from=tmp_path / "start", hidden_size=32), "hidden_size: expected 16")
    small_model(num_tokens=4, grid=(1, 2, 2)).save_pretrained(tmp_path / "other")
    refused(options(init_from=tmp_path / "other"), "init_from: expected grid")


def refused(options, message, left=()):
    """``options`` are refused, and the output folder is what it was."""
    from pathlib import Path

    with pytest.raises(OptionError, match=message):
        train(options)
    folder = Path(options.output_dir)
    assert sorted(p.name for p in folder.iterdir()) == list(left) if left else not folder.exists()


def tree(folder, files):
    from pathlib import Path

    for name, text in files.items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_text(text)


def poison(folder, key):
    """Put a NaN into the first number of a sample's EVA tokens, and mend the digest."""
    import hashlib

    import torch
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        rows = [i for i, record in enumerate(records) if record["key"] == key]
        if rows:
            tensors = load_file(path)
            tensors["eva"][rows[0], 0, 0] = torch.nan
            save_file(tensors, path)
            manifest = json.loads((folder / "manifest.json").read_text())
            for entry in manifest["shards"]:
                if entry["file"] == path.name:
                    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                    entry["bytes"] = path.stat().st_size
            (folder / "manifest.json").write_text(json.dumps(manifest))
