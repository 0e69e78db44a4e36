"""Several processes extract one data set: what one writes, bit for bit, whatever happens."""

import os
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from blip3o_fast.atomic import locked
from blip3o_fast.claims import CLAIMS_FILE
from blip3o_fast.data import Manifest
from blip3o_fast.errors import OptionError
from blip3o_fast.extraction.extract import ExtractionSettings, Stopped, extract, extract_share
from blip3o_fast.extraction.image_sources import folder_images, webdataset_tars
from tests.extraction.forks import contents

ROOT = Path(__file__).parents[2]
FP32 = ExtractionSettings(dtype="fp32", batch_size=3, samples_per_shard=4)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and its locks")


@pytest.fixture
def tar_folder(image_folder, tmp_path):
    """Three tars, of five, four and no images."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in ("a", "b", "c"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for path in sorted((image_folder / name).glob("*.png")):
                tar.add(path, path.name)
    return folder


@pytest.mark.parametrize(
    "source", ["image_folder", pytest.param("tar_folder", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(rounds, source, request, image_folder, tmp_path):
    """Each round kills one of two, and later one, two and three processes in turn."""
    (image_folder / "b" / "7.png").write_bytes(b"no image")
    images, seed = request.getfixturevalue(source), random.randrange(2**32)
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "tests.extraction.forks"]
    done = subprocess.run(
        [*command, str(images), str(tmp_path / "out"), str(rounds), str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (seed, done.stderr)
    assert int(done.stdout) >= rounds, f"seed {seed}: few of the {7 * rounds} kills struck"


@pytest.mark.parametrize("source", ["image_folder", "tar_folder"])
def test_a_share_alone_is_the_whole(source, request, image_folder, towers, tmp_path):
    folder = request.getfixturevalue(source)

    def images():
        return (
            webdataset_tars(f"{folder}/*.tar") if "tars" in str(folder) else folder_images(folder)
        )

    report = extract(images(), towers, tmp_path / "whole", FP32)
    whole = contents(tmp_path / "whole")
    assert extract_share(images(), towers, tmp_path / "out", FP32) == report
    assert contents(tmp_path / "out") == whole
    again = extract_share(images(), towers, tmp_path / "out", FP32)
    assert again == report._replace(added=0)
    assert contents(tmp_path / "out") == whole


def test_shards_are_cut_where_the_images_say_so(image_folder, tar_folder, towers, tmp_path):
    """An image that cannot be read leaves its own shard shorter and moves no other sample."""
    (image_folder / "a" / "1.png").write_bytes(b"")
    extract(folder_images(image_folder), towers, tmp_path / "list", FP32)
    shards = Manifest.load(tmp_path / "list").shards
    assert [(entry.file, entry.samples) for entry in shards] == [
        ("shard_lot00000_00000.safetensors", 3),
        ("shard_lot00001_00000.safetensors", 4),
        ("shard_lot00002_00000.safetensors", 2),
    ]
    extract(webdataset_tars(f"{tar_folder}/*.tar"), towers, tmp_path / "tars", FP32)
    shards = Manifest.load(tmp_path / "tars").shards
    assert [(entry.file, entry.samples) for entry in shards] == [
        ("shard_lot00000_00000.safetensors", 4),
        ("shard_lot00000_00001.safetensors", 1),
        ("shard_lot00001_00000.safetensors", 4),
        ("shard_lot00001_00001.safetensors", 1),
    ]


def test_stopping_drops_the_shard_in_progress(image_folder, towers, tmp_path):
    refs, out = folder_images(image_folder), tmp_path / "out"
    extract(refs, towers, tmp_path / "whole", FP32)
    answers = iter([False, False, True])
    with pytest.raises(Stopped, match="stopped with 4 samples"):
        extract_share(refs, towers, out, FP32, stop=lambda: next(answers))
    extract_share(refs, towers, out, FP32)
    assert contents(out) == contents(tmp_path / "whole")


def test_an_image_that_was_replaced_is_named(image_folder, towers, tmp_path, make_image):
    refs, out = folder_images(image_folder), tmp_path / "out"
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        extract_share(refs, towers, out, FP32, stop=lambda: next(answers))
    make_image(99).save(image_folder / "a" / "2.png")
    with pytest.raises(ValueError, match=r"a/2\.png: expected the image and the caption"):
        extract_share(refs, towers, out, FP32)


def test_other_writers_are_kept_out(image_folder, towers, tmp_path):
    refs, out = folder_images(image_folder), tmp_path / "out"
    with locked(out), pytest.raises(OptionError, match="another process does"):
        extract_share(refs, towers, out, FP32)
    with locked(out, shared=True), pytest.raises(OptionError, match="another process does"):
        extract(refs, towers, out, FP32)
    with pytest.raises(OptionError, match="max_samples: expected a single process"):
        extract_share(refs, towers, out, replace(FP32, max_samples=3))


def test_others_with_other_settings_are_refused(image_folder, towers, tmp_path):
    """A child is at work while this process comes with another shard size, then another list."""
    refs, out = folder_images(image_folder), tmp_path / "out"
    here, there = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:

        def wait():
            os.write(here[1], b"x")
            os.read(there[0], 1)
            return True

        try:
            extract_share(refs, towers, out, FP32, stop=wait)
        finally:
            os._exit(0)
    os.read(here[0], 1)
    for images, settings in ((refs, replace(FP32, samples_per_shard=5)), (refs[1:], FP32)):
        with pytest.raises(OptionError, match="expected the same images and settings"):
            extract_share(images, towers, out, settings)
    os.write(there[1], b"x")
    os.waitpid(child, 0)
    assert (out / CLAIMS_FILE).exists()
    assert extract_share(refs, towers, out, FP32).samples == 10
    assert not (out / CLAIMS_FILE).exists()


def test_nothing_to_write(tmp_path, towers):
    with pytest.raises(ValueError, match="nothing to write; there were no images"):
        extract_share([], towers, tmp_path / "out", FP32)
    assert not (tmp_path / "out").exists()
