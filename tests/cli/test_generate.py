"""``blip3o-fast generate``: shards in, shards out, the same whatever happens in between."""

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import small_model, write_shards

from blip3o_fast import SamplingPlan, translation
from blip3o_fast.atomic import file_sha256, locked
from blip3o_fast.cli.main import main
from blip3o_fast.data import EmbeddingDataset, Manifest, ShardWriter
from blip3o_fast.data.tensorfile import read_header
from blip3o_fast.seeds import sample_seed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def given(tmp_path):
    """A model and shards of 24 samples, and the command that translates them."""
    small_model().save_pretrained(tmp_path / "model")
    write_shards(tmp_path / "shards")
    return [
        *("generate", "--model_path", str(tmp_path / "model")),
        *("--embeddings_dir", str(tmp_path / "shards"), "--num_inference_steps", "3"),
        *("--store_dtype", "fp32", "--batch_size", "5", "--samples_per_shard", "7"),
        *("--no_progress", "--device", "cpu"),
    ]


def translated(folder):
    """Every sample's tokens by key."""
    data = EmbeddingDataset(folder, verify=True)
    batch = data.read(range(len(data)))
    assert batch.eva.shape[-1] == 0
    return dict(zip(batch.keys, batch.clip, strict=True))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, tokens in expected.items():
        torch.testing.assert_close(got[key], tokens, rtol=1e-5, atol=1e-5)


def test_translates_every_sample(given, tmp_path, capsys):
    assert main([*given, "--output_dir", str(tmp_path / "clip")]) == 0
    assert "24 samples" in capsys.readouterr().out
    source = EmbeddingDataset(tmp_path / "shards")
    batch = source.read(range(len(source)))
    expected = small_model().generate(
        batch.eva, 3, seeds=[sample_seed(key, 0) for key in batch.keys]
    )
    assert_same(translated(tmp_path / "clip"), dict(zip(batch.keys, expected, strict=True)))
    manifest = EmbeddingDataset(tmp_path / "clip").manifest
    assert "3 heun steps" in manifest.clip_encoder.layer and manifest.eva_encoder is None


def fail_after_12(monkeypatch):
    """The machine goes away once 12 samples have their noise."""
    calls = []

    def failing(key, seed):
        calls.append(key)
        if len(calls) > 12:
            raise OSError("the machine went away")
        return sample_seed(key, seed)

    monkeypatch.setattr("blip3o_fast.translation.sample_seed", failing)


def test_goes_on_where_it_stopped(given, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*given, "--output_dir", str(whole)]) == 0
    fail_after_12(monkeypatch)
    assert main([*given, "--output_dir", str(cut)]) == 1
    assert not (cut / "manifest.json").exists()
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*given, "--output_dir", str(cut)]) == 0
    assert "17 of them new" in capsys.readouterr().out
    assert_same(translated(cut), translated(whole))


def test_batch_size_changes_nothing(given, tmp_path):
    for name, size in (("one", "24"), ("other", "1")):
        command = [*given, "--output_dir", str(tmp_path / name), "--batch_size", size]
        assert main(command) == 0
    assert_same(translated(tmp_path / "one"), translated(tmp_path / "other"))


def test_two_processes_share_the_work(given, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += ["-m", "blip3o_fast", *given, "--output_dir", str(tmp_path / "two")]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert main([*given, "--output_dir", str(tmp_path / "one")]) == 0
    assert_same(translated(tmp_path / "two"), translated(tmp_path / "one"))


def test_another_setting_does_not_continue_a_folder(given, tmp_path, capsys):
    command = [*given, "--output_dir", str(tmp_path / "clip")]
    assert main(command) == 0
    assert main([*command, "--seed", "1"]) == 1
    assert "clip_encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_inference_steps", "0"], "num_inference_steps: expected at least 1"),
        (["--batch_size", "0"], "batch_size: expected at least 1"),
        (["--graph"], "CUDA"),
    ],
)
def test_bad_options(given, tmp_path, capsys, options, message):
    folder = tmp_path / "clip"
    assert main([*given, "--output_dir", str(folder), *options]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (folder / "manifest.json").exists()


def test_fp8_is_refused_before_anything_is_written(given, tmp_path, capsys):
    assert main([*given, "--output_dir", str(tmp_path / "clip"), "--dtype", "fp8"]) != 0
    err = capsys.readouterr().err
    assert "dtype: fp8: expected an NVIDIA GPU of compute capability 8.9 or at least 9.0" in err
    assert err.endswith("choose bf16, fp16 or fp32\n") and "torch." not in err
    assert not (tmp_path / "clip").exists()
    with pytest.raises(SystemExit):
        main([*given, "--output_dir", str(tmp_path / "clip"), "--store_dtype", "fp8"])


def test_the_source_is_not_overwritten(given, tmp_path, capsys):
    assert main([*given, "--output_dir", str(tmp_path / "shards")]) == 2
    assert "another folder" in capsys.readouterr().err


def test_model_of_another_width(given, tmp_path, capsys):
    small_model(eva_embedding_size=11).save_pretrained(tmp_path / "model")
    assert main([*given, "--output_dir", str(tmp_path / "clip")]) == 2
    assert "expected EVA width 11" in capsys.readouterr().err
    assert not (tmp_path / "clip").exists()


def test_reading_translating_and_writing_overlap(given, tmp_path, monkeypatch):
    """The first batch is written while the second is translated and the third is read."""
    meeting, calls = threading.Barrier(3, timeout=60), Counter()

    def watch(owner, name, which):
        whole = getattr(owner, name)

        def watched(*args, **options):
            calls[name] += 1
            if calls[name] == which:
                meeting.wait()
            return whole(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(EmbeddingDataset, "read", 3)
    watch(SamplingPlan, "__call__", 2)
    watch(ShardWriter, "add", 1)
    assert main([*given, "--output_dir", str(tmp_path / "clip"), "--batch_size", "4"]) == 0
    assert calls == {"read": 6, "__call__": 6, "add": 6}
    monkeypatch.undo()
    assert len(translated(tmp_path / "clip")) == 24


def test_a_bad_sample_stops_the_work_and_is_named(given, tmp_path, capsys):
    shard = tmp_path / "shards" / "shard_00001.safetensors"
    spec = read_header(shard)["eva"]
    row_bytes = (spec.stop - spec.start) // 10
    bad = bytearray(shard.read_bytes())
    bad[spec.start + 6 * row_bytes : spec.start + 6 * row_bytes + 4] = b"\0\0\xc0\x7f"
    shard.write_bytes(bad)
    mend_manifest(tmp_path / "shards")
    assert main([*given, "--output_dir", str(tmp_path / "clip")]) == 1
    assert "row 6 (key 'sample16'): eva holds NaN" in capsys.readouterr().err
    # Batches of 5: the fourth was bad, and of the 15 before it two shards of 7 were full.
    assert len(list((tmp_path / "clip").glob("shard_*.safetensors"))) == 2


def mend_manifest(folder):
    """Let the manifest list the shards as they are."""
    manifest = Manifest.load(folder)
    entries = [
        replace(
            entry,
            sha256=file_sha256(folder / entry.file),
            records_sha256=file_sha256((folder / entry.file).with_suffix(".jsonl")),
        )
        for entry in manifest.shards
    ]
    manifest.replace(shards=tuple(entries)).save(folder)


def replace_weights(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.output_proj.bias += 1e-4
    model.save_pretrained(tmp_path / "model")


def replace_shard(tmp_path):
    """Another shard of the same size, which the manifest does not know."""
    path = tmp_path / "shards" / "shard_00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_data_set(tmp_path):
    replace_shard(tmp_path)
    mend_manifest(tmp_path / "shards")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_weights, "clip_encoder.revision: expected weights"),
        (replace_shard, "shard_00002.safetensors: corrupted or replaced"),
        (replace_data_set, "clip_encoder.preprocessing: expected translated from .*, shards"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_what_was_replaced_is_named(
    given, tmp_path, monkeypatch, capsys, change, message, finished
):
    command = [*given, "--output_dir", str(tmp_path / "clip")]
    if not finished:
        fail_after_12(monkeypatch)
    assert main(command) == (0 if finished else 1)
    monkeypatch.undo()
    before = {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()}
    change(tmp_path)
    capsys.readouterr()
    assert main(command) == 1
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "clip").iterdir()}


def test_the_checkpoint_that_best_points_to_may_not_change(given, tmp_path, capsys):
    run = tmp_path / "run"
    small_model().save_pretrained(run / "step_1")
    small_model(rope_theta=100.0).save_pretrained(run / "step_2")
    (run / "best").write_text("step_1\n")
    command = [*given, "--model_path", str(run), "--output_dir", str(tmp_path / "clip")]
    assert main(command) == 0
    (run / "best").write_text("step_2\n")
    capsys.readouterr()
    assert main(command) == 1
    assert "clip_encoder.revision: expected weights" in capsys.readouterr().err


def test_a_folder_that_another_process_writes_to(given, tmp_path, capsys):
    with locked(tmp_path / "clip"):
        assert main([*given, "--output_dir", str(tmp_path / "clip")]) == 2
    assert "expected a folder that nobody else writes to" in capsys.readouterr().err


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_two_commands_in_one_folder(given, tmp_path, rounds):
    """One of them does the work, the other is refused or finds it done; nothing is lost."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for i in range(rounds):
        command = [sys.executable, "-m", "blip3o_fast", *given]
        command += ["--output_dir", str(tmp_path / f"clip{i}"), "--num_inference_steps", "30"]
        pair = [
            subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]
        errors = [child.communicate(timeout=120)[1] for child in pair]
        codes = sorted(child.returncode for child in pair)
        assert codes in ([0, 0], [0, 2]), errors
        assert len(translated(tmp_path / f"clip{i}")) == 24


def test_untranslated(given, tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "_STRETCH", 7)
    data = EmbeddingDataset(tmp_path / "shards")
    done = {f"sample{i}" for i in (0, 1, 7, 9, 22)}
    expected = [i for i in range(24) if i not in (0, 1, 7, 9, 22)]
    assert translation.untranslated(data, done).tolist() == expected
    assert translation.untranslated(data, set()).tolist() == list(range(24))


def test_batches():
    assert [part.tolist() for part in translation.batches(np.arange(3), 2)] == [[0, 1], [2]]
