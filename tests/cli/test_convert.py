"""``blip3o-fast convert``."""

import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from published_files import coco_content, shard_content, shard_path, towers, write_pickle

from blip3o_fast.atomic import locked
from blip3o_fast.cli.main import main
from blip3o_fast.data import EmbeddingDataset, Manifest


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "pub"
    folder.mkdir()
    for seed in (0, 1):
        write_pickle(shard_path(folder, seed), shard_content(5, seed=seed))
    return folder


def convert(*words):
    return main(["convert", *map(str, words)])


def test_published_shards(published, tmp_path, capsys):
    assert convert(published, tmp_path / "out", "--samples_per_shard", 4) == 0
    out = capsys.readouterr().out
    assert "2 files, 10 samples of 256 tokens (without CLS, grid (1, 16, 16)), widths 12" in out
    assert "fp32: 200 KiB in 3 shards of 4" in out
    assert "--dtype fp16 would halve this and lose nothing" in out
    assert "10 samples written, 0 left out; checksums and up to 64 rows verified" in out
    dataset = EmbeddingDataset(tmp_path / "out", verify=True)
    expected = torch.cat([towers(5, seed=seed)[0] for seed in (0, 1)])
    assert torch.equal(dataset.read(range(10)).eva, expected)


def test_options(published, tmp_path, capsys):
    options = ("--dtype", "fp16", "--tokens", 257, "--max_shards", 1, "--heldout_fraction", 0.5)
    names = ("--eva_encoder", "a", "--clip_encoder", "b", "--training_mode", "patch_only")
    assert convert(published, tmp_path / "out", *options, *names) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.dtype, manifest.tokens, manifest.samples) == ("fp16", 257, 5)
    assert manifest.split.heldout_fraction == 0.5
    assert (manifest.eva_encoder.name, manifest.clip_encoder.name) == ("a", "b")
    assert "remark: 1 sources without CLS: token 0 is the mean" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(published, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert convert(published, tmp_path / "out", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "10 samples of 256 tokens" in out and "dry run: nothing was written" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_coco_file_with_black_images(tmp_path, capsys):
    eva, clip = towers(6)
    eva[2], clip[2] = eva[4].clone(), clip[4].clone()
    content = coco_content(6, eva_embeddings=eva, clip_embeddings=clip)
    path = write_pickle(tmp_path / "coco_embeddings_consolidated.pkl", content)
    assert convert(path, tmp_path / "out") == 0
    assert "remark: 2 samples have identical features" in capsys.readouterr().out


def test_npy_pairs(tmp_path):
    for name, width in (("eva", 6), ("clip", 5)):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 12, width), np.float32))
    words = ("--grid", 3, 2, 2, "--verify_rows", 3)
    assert convert(tmp_path, tmp_path / "out", *words) == 0
    assert Manifest.load(tmp_path / "out").grid == (3, 2, 2)


@pytest.mark.parametrize("as_folder", [False, True])
def test_tars_of_arrays(tmp_path, as_folder):
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for name, width in (("k.eva.npy", 6), ("k.clip.npy", 5)):
            buffer = io.BytesIO()
            np.save(buffer, np.full((4, width), width, np.float16))
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    assert convert(tmp_path if as_folder else path, tmp_path / "out") == 0
    assert EmbeddingDataset(tmp_path / "out").read([0]).eva.unique().tolist() == [6.0]


def test_bad_rows(published, tmp_path, capsys):
    eva, _ = towers(5, seed=7)
    eva[3, 4, 5] = torch.nan
    content = shard_content(5, seed=7, eva_blip3o_embeddings=eva)
    write_pickle(shard_path(published, 7), content)
    assert convert(published, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "shard_00007_patch_only.pkl: row 3 (key '000070003'): eva holds NaN" in err
    assert err.count("\n") == 1 and not (tmp_path / "out" / "manifest.json").exists()
    assert convert(published, tmp_path / "out", "--skip_bad_rows") == 0
    out = capsys.readouterr().out
    assert "left out: embeddings_shard_00007_patch_only.pkl: row 3" in out and "1 left out" in out


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("options", [(), ("--dry_run",)])
def test_a_payload_is_refused_and_nothing_runs(tmp_path, capsys, options):
    ran = tmp_path / "ran"
    path = write_pickle(tmp_path / "x.pkl", Payload(ran))
    assert convert(path, tmp_path / "out", *options) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "x.pkl: refused: expected a pickle of tensors and plain data, got the name" in err
    assert "nothing of it ran" in err
    assert not ran.exists() and not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes())
    assert ran.exists()  # the payload was live


def test_a_payload_that_nobody_needs_is_left_alone(tmp_path):
    ran = tmp_path / "ran"
    content = shard_content(2, config={"mode": [Payload(ran)]})
    assert convert(write_pickle(tmp_path / "x.pkl", content), tmp_path / "out") == 0
    assert not ran.exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--samples_per_shard", "0"), 2, "samples_per_shard: expected at least 1, got 0"),
        (("--verify_rows", "0"), 2, "verify_rows: expected at least 1, got 0"),
        (("--max_shards", "-1"), 2, "max_shards: expected at least 1, got -1"),
        (("--heldout_fraction", "1"), 2, "heldout_fraction: expected at least 0 and below 1"),
        (("--tokens", "99"), 1, "tokens: expected 256 or 257, got 99"),
        (("--grid", "1", "2", "3"), 1, "tokens: expected 6 for grid"),
    ],
)
def test_bad_options(published, tmp_path, capsys, words, status, message):
    assert convert(published, tmp_path / "out", *words) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_places(published, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, dest, status, message in (
        (published, tmp_path / "file", 2, "dest: expected a folder, got the file"),
        (published, published, 2, "dest: expected another folder than the source"),
        (tmp_path / "nowhere", tmp_path / "out", 1, "no such file or folder"),
        (tmp_path / "empty", tmp_path / "out", 1, "expected published pickles"),
        (tmp_path / "file", tmp_path / "out", 1, "file: truncated"),
    ):
        assert convert(source, dest) == status
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_source_that_was_replaced_is_named(published, tmp_path, capsys, finished):
    """One number of one row, which no sample of rows would find."""
    out = tmp_path / "out"
    command = (published, out, "--samples_per_shard", 2, "--verify_rows", 1)
    if not finished:
        bad, _ = towers(5, seed=1)
        bad[4, 0, 0] = torch.nan
        content = shard_content(5, seed=1, eva_blip3o_embeddings=bad)
        write_pickle(shard_path(published, 1), content)
    assert convert(*command) == (0 if finished else 1)
    assert (out / "manifest.json").exists() == finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    eva, _ = towers(5)
    eva[1, 7, 3] += 1
    write_pickle(shard_path(published, 0), shard_content(5, eva_blip3o_embeddings=eva))
    capsys.readouterr()
    assert convert(*command) == 1
    err = capsys.readouterr().err
    assert "eva of '000000001' differs from row 1 of embeddings_shard_00000" in err
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_that_another_process_writes_to(published, tmp_path, capsys):
    with locked(tmp_path / "out"):
        assert convert(published, tmp_path / "out") == 2
    assert "expected a folder that nobody else writes to" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_goes_on(tmp_path, number):
    folder = tmp_path / "pub"
    folder.mkdir()
    eva, clip = torch.zeros(24, 256, 512), torch.zeros(24, 256, 128)
    for seed in range(3):
        eva += torch.arange(24)[:, None, None] + 1
        content = shard_content(24, seed=seed, eva_blip3o_embeddings=eva)
        write_pickle(shard_path(folder, seed), {**content, "clip_blip3o_embeddings": clip})
    words = [sys.executable, "-m", "blip3o_fast", "convert", folder, tmp_path / "out"]
    words += ["--samples_per_shard", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/shard_00002.safetensors")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(number)
    assert process.returncode == -number
    assert convert(folder, tmp_path / "out", "--samples_per_shard", 3) == 0
    assert convert(folder, tmp_path / "whole", "--samples_per_shard", 3) == 0
    out, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("out", "whole")
    )
    assert out == whole
