"""``blip3o-fast extract``: sources, options, exit statuses."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from blip3o_fast.cli import extract as command
from blip3o_fast.cli.main import main
from blip3o_fast.data import EmbeddingDataset, Manifest
from blip3o_fast.extraction.encoders import Preprocessing, Tower, TowerPair
from blip3o_fast.options.extract import add_arguments

ROOT = Path(__file__).parents[2]


def patch_means(pixels):
    return F.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)


def fake_pair(forward=patch_means):
    raw = Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    cpu = torch.device("cpu")
    tower = Tower("colour", "1", "mean", raw, 3, (4, 4), False, forward, cpu, torch.float32)
    return TowerPair(tower, tower._replace(name="other"))


@pytest.fixture
def asked(monkeypatch):
    """Replaces the towers by mean colours, and keeps what the command asked for."""
    calls = []

    def load_towers(pair, **options):
        calls.append({"pair": pair, **options})
        return fake_pair()

    monkeypatch.setattr(command, "load_towers", load_towers)
    return calls


def image(seed, size=(300, 200)):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(4):
        image(n).save(folder / f"{n}.png")
    (folder / "broken.jpg").write_bytes(b"")
    return folder


def run(*words):
    return main(["extract", *map(str, words), "--no_progress"])


def test_folder(images, tmp_path, asked, capsys):
    out = tmp_path / "out"
    assert run("--images", images, "--output_dir", out, "--towers", "lite") == 0
    captured = capsys.readouterr()
    assert "4 samples in" in captured.out
    assert "skipped broken.jpg: empty file" in captured.err
    assert "1 images skipped, listed in" in captured.err
    assert (asked[0]["pair"], asked[0]["dtype"]) == ("lite", None)
    manifest = Manifest.load(out)
    assert (manifest.dtype, manifest.tokens, manifest.split.heldout_fraction) == ("fp16", 16, 0.1)
    assert run("--images", images, "--output_dir", out, "--towers", "lite") == 0
    assert "4 samples in" in capsys.readouterr().out
    assert run("--images", images, "--output_dir", out, "--no_resume") == 1
    assert "already holds 4 samples" in capsys.readouterr().err


def test_crops_and_shards(images, tmp_path, asked):
    out = tmp_path / "out"
    options = ("--crops", 3, "--mirror", "--seed", 5, "--samples_per_shard", 10)
    stored = ("--store_dtype", "bf16", "--heldout_fraction", 0.5, "--max_samples", 23)
    assert run("--images", images, "--output_dir", out, *options, *stored) == 0
    data = EmbeddingDataset(out)
    assert [entry.samples for entry in data.manifest.shards] == [10, 10, 3]
    assert data.read([0]).keys == ("0.png#5.0",)
    assert data.dtype == torch.bfloat16
    assert data.manifest.split.heldout_fraction == 0.5


def test_webdataset(tmp_path, asked):
    for n in range(2):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            file = io.BytesIO()
            image(n).save(file, "JPEG")
            for name, data in (("x.jpg", file.getvalue()), ("x.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    out = tmp_path / "out"
    assert run("--webdataset", tmp_path / "{0..1}.tar", "--output_dir", out, "--crops", 1) == 0
    data = EmbeddingDataset(out)
    assert data.read([0, 1]).keys == ("0/x#0.0", "1/x#0.0")
    assert [record.caption for record in data.records([0, 1])] == ["a caption"] * 2


def test_coco(images, tmp_path, asked):
    (tmp_path / "annotations").mkdir()
    images.rename(tmp_path / "train2017")
    values = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in (2, 7)],
        "annotations": [{"image_id": 2, "caption": "two"}],
    }
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(values))
    out = tmp_path / "out"
    assert run("--coco", tmp_path, "--coco_split", "train2017", "--output_dir", out) == 0
    assert EmbeddingDataset(out).records([0])[0].caption == "two"
    (line,) = (out / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "coco_7"


def test_the_default_towers_announce_what_they_download(images, tmp_path, asked, capsys):
    assert run("--images", images, "--output_dir", tmp_path / "a") == 0
    err = capsys.readouterr().err
    assert "hf:BAAI/EVA-CLIP-8B and hf:openai/clip-vit-large-patch14" in err and "35 GB" in err
    for flag in ("--eva_path", "--clip_path", "--towers lite"):
        assert flag in err
    for options in (("--towers", "lite"), ("--eva_path", "E", "--clip_path", "C")):
        assert run("--images", images, "--output_dir", tmp_path / options[1], *options) == 0
        assert "GB" not in capsys.readouterr().err


def test_tower_options(images, tmp_path, asked):
    assert run("--images", images, "--output_dir", tmp_path / "a") == 0
    options = (
        *("--eva_path", "E", "--clip_path", "C", "--eva_revision", "e", "--clip_revision", "c"),
        *("--device", "cpu", "--clip_device", "meta", "--dtype", "bf16"),
    )
    assert run("--images", images, "--output_dir", tmp_path / "b", *options) == 0
    assert asked[0]["pair"] == "clip+eva"
    assert asked[0]["eva_path"] == "hf:BAAI/EVA-CLIP-8B"
    assert asked[0]["clip_path"] == "hf:openai/clip-vit-large-patch14"
    assert asked[1] == {
        "pair": "clip+eva",
        "eva_path": Path("E"),
        "clip_path": Path("C"),
        "eva_revision": "e",
        "clip_revision": "c",
        "device": torch.device("cpu"),
        "clip_device": torch.device("meta"),
        "dtype": torch.bfloat16,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch_size", 0), "batch_size: expected at least 1, got 0"),
        (("--num_workers", -1), "num_workers: expected at least 1, got -1"),
        (("--crops", -1), "crops: expected at least 0, got -1"),
        (("--max_samples", 0), "max_samples: expected at least 1, got 0"),
        (("--heldout_fraction", 1), "heldout_fraction: expected at least 0 and below 1, got 1"),
        (("--mirror",), "mirror: expected crops of 1 or more"),
        (("--device", "toaster"), "device: expected auto, cpu, cuda or cuda:N, got 'toaster'"),
        (("--device", "cuda:99"), "device: expected one of"),
    ],
)
def test_bad_options_exit_with_2(images, tmp_path, asked, capsys, options, message):
    assert run("--images", images, "--output_dir", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "absent"), "absent: expected a folder of images"),
        (("--webdataset", "absent.tar"), "absent.tar: no such tar"),
        (("--coco", "absent"), "expected the caption annotations of COCO"),
        (("--images", ".", "--eva_path", "absent"), "expected image files"),
    ],
)
def test_what_fails_exits_with_1(tmp_path, monkeypatch, asked, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run(*options, "--output_dir", "out") == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_missing_weights(images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    assert run("--images", images, "--output_dir", "out", "--clip_path", "./absent") == 1
    assert "absent: expected a folder of weights or a hub id" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["extract", "--output_dir", "x"],
        ["extract", "--images", "a", "--coco", "b", "--output_dir", "x"],
        ["extract", "--images", "a"],
        ["extract", "--images", "a", "--output_dir", "x", "--towers", "medium"],
    ],
)
def test_bad_arguments(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_sigterm_keeps_the_samples_so_far(images, tmp_path, monkeypatch, capsys):
    asked = []

    def forward(pixels):
        if not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return patch_means(pixels)

    monkeypatch.setattr(command, "load_towers", lambda *args, **options: fake_pair(forward))
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    words = ("--images", images, "--output_dir", out, "--batch_size", 1)
    assert run(*words) == 143
    assert "run again to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    kept = sum(path.suffix == ".safetensors" for path in out.iterdir())
    assert kept == 1
    monkeypatch.setattr(command, "load_towers", lambda *args, **options: fake_pair())
    assert run(*words) == 0
    assert EmbeddingDataset(out).read(range(4)).keys == ("0.png", "1.png", "2.png", "3.png")


def test_sigterm_after_the_last_batch_is_not_forgotten(images, tmp_path, monkeypatch):
    def extract_and_stop(*args, **options):
        report = extract(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return report

    extract = command.extract
    monkeypatch.setattr(command, "extract", extract_and_stop)
    monkeypatch.setattr(command, "load_towers", lambda *args, **options: fake_pair())
    out = tmp_path / "out"
    assert run("--images", images, "--output_dir", out) == 143
    assert len(EmbeddingDataset(out)) == 4


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment that torchrun gives the second of two processes."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_process_whose_others_do_not_come_does_it_all(
    images, tmp_path, asked, monkeypatch, capsys, second_of_two
):
    words = ("--images", images, "--crops", 2, "--samples_per_shard", 3)
    assert run(*words, "--output_dir", tmp_path / "shared") == 0
    assert "8 samples in" in capsys.readouterr().out
    monkeypatch.delenv("RANK")
    assert run(*words, "--output_dir", tmp_path / "alone") == 0
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


@pytest.mark.parametrize(
    ("options", "device", "clip_device"),
    [
        ((), "cuda:1", "cuda:1"),
        (("--device", "cuda"), "cuda:1", "cuda:1"),
        (("--device", "cuda:0"), "cuda:0", "cuda:0"),
        (("--clip_device", "cpu"), "cuda:1", "cpu"),
    ],
)
def test_each_process_has_its_gpu(
    images, tmp_path, asked, monkeypatch, second_of_two, options, device, clip_device
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run("--images", images, "--output_dir", tmp_path / "out", *options) == 0
    assert (str(asked[0]["device"]), str(asked[0]["clip_device"])) == (device, clip_device)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("--max_samples", 3), {}, "max_samples: expected a single process, got several"),
        (("--no_resume",), {}, "no_resume: expected a single process, got several"),
        ((), {"LOCAL_RANK": "x"}, "LOCAL_RANK: expected a number in the environment, got 'x'"),
    ],
)
def test_what_several_processes_cannot_do(
    images, tmp_path, asked, monkeypatch, capsys, second_of_two, options, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("--images", images, "--output_dir", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not asked and not (tmp_path / "out").exists()


def test_every_option_is_explained():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for action in parser._actions:
        assert action.help, action.option_strings


@pytest.mark.realdata
def test_lite_towers_end_to_end(images, tmp_path):
    """Twice the same image gives twice the same tokens; another gives others."""
    image(0).save(images / "again.png")
    out = tmp_path / "out"
    words = ("--images", images, "--output_dir", out, "--towers", "lite", "--device", "cpu")
    assert run(*words, "--store_dtype", "fp32") == 0
    data = EmbeddingDataset(out)
    assert (data.eva_width, data.clip_width, data.tokens) == (120, 112, 256)
    batch = data.read(range(5))
    row = dict(zip(batch.keys, range(5), strict=True))
    for tokens in (batch.eva, batch.clip):
        torch.testing.assert_close(
            tokens[row["0.png"]], tokens[row["again.png"]], atol=1e-4, rtol=0
        )
        assert (tokens[row["0.png"]] - tokens[row["1.png"]]).abs().max() > 1


@pytest.mark.realdata
@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_writes(images, tmp_path):
    for n in range(5, 25):
        image(n).save(images / f"{n}.png")
    words = ["extract", "--images", images, "--towers", "lite", "--device", "cpu", "--no_progress"]
    words += ["--samples_per_shard", "3", "--batch_size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for start, name in (([sys.executable], "one"), (command, "two")):
        done = subprocess.run(
            [*start, "-m", "blip3o_fast", *map(str, words), "--output_dir", tmp_path / name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "two") == files(tmp_path / "one")
