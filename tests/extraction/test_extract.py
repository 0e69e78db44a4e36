"""Images to shards: what is written, what is skipped, and going on after an interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_fast.data import EmbeddingDataset, Manifest, Split
from blip3o_fast.extraction.encoders import TowerPair
from blip3o_fast.extraction.extract import (
    SKIPPED_FILE,
    ExtractionSettings,
    Stopped,
    extract,
    open_view,
)
from blip3o_fast.extraction.image_sources import ImageRef, folder_images
from blip3o_fast.extraction.images import UnreadableImage, load_rgb, to_pixels

FP32 = ExtractionSettings(dtype="fp32", batch_size=3, samples_per_shard=4)


def contents(folder):
    """key -> (caption, source, eva, clip) of all samples, in order."""
    data = EmbeddingDataset(folder)
    batch, records = data.read(range(len(data))), data.records(range(len(data)))
    rows = zip(records, batch.eva, batch.clip, strict=True)
    return {r.key: (r.caption, r.photo, eva, clip) for r, eva, clip in rows}


def same(a, b):
    return list(a) == list(b) and all(
        a[k][:2] == b[k][:2] and torch.equal(a[k][2], b[k][2]) and torch.equal(a[k][3], b[k][3])
        for k in a
    )


def colours(image):
    """Mean colours of the 4 x 4 patches, by hand."""
    pixels = to_pixels(image, 32).float()
    rows = [
        pixels[:, y : y + 8, x : x + 8].mean((1, 2))
        for y in range(0, 32, 8)
        for x in range(0, 32, 8)
    ]
    return torch.stack(rows)


def skipped(folder):
    return [tuple(json.loads(line).values()) for line in (folder / SKIPPED_FILE).open()]


def test_tokens_records_and_manifest(image_folder, towers, tmp_path):
    refs = folder_images(image_folder)
    report = extract(refs, towers, tmp_path / "out", FP32)
    assert report == (10, 10, ())
    found = contents(tmp_path / "out")
    assert list(found) == [ref.key for ref in refs]
    assert [f[:2] for f in found.values()] == [(ref.caption, ref.key) for ref in refs]
    for ref in refs:
        expected = colours(load_rgb(ref.data))
        torch.testing.assert_close(found[ref.key][2], expected)
        torch.testing.assert_close(found[ref.key][3], expected[:, :1] / 2)
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.tokens, manifest.has_cls, manifest.grid) == (16, False, (1, 4, 4))
    assert [entry.samples for entry in manifest.shards] == [4, 4, 2]
    assert manifest.eva_encoder is not None
    assert (manifest.eva_encoder.name, manifest.eva_encoder.revision) == ("colour", "1")
    assert "short side 32" in manifest.eva_encoder.preprocessing
    assert manifest.notes["skipped"] == 0
    assert not (tmp_path / "out" / SKIPPED_FILE).exists()


def test_cls_is_kept_first_on_request(image_folder, towers, tmp_path):
    refs = folder_images(image_folder)
    extract(refs, towers, tmp_path / "out", replace(FP32, include_cls=True))
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.tokens, manifest.has_cls) == (17, True)
    for ref, (_, _, eva, clip) in zip(refs, contents(tmp_path / "out").values(), strict=True):
        patches = colours(load_rgb(ref.data))
        torch.testing.assert_close(eva, torch.cat((patches.mean(0, keepdim=True), patches)))
        torch.testing.assert_close(clip, eva[:, :1] / 2)


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (3, 7), (8, 64)])
def test_the_result_does_not_depend_on_batches_and_threads(
    image_folder, towers, tmp_path, workers, batch_size
):
    refs = folder_images(image_folder)
    extract(refs, towers, tmp_path / "a", FP32)
    other = replace(FP32, workers=workers, batch_size=batch_size, samples_per_shard=100)
    extract(refs, towers, tmp_path / "b", other)
    assert same(contents(tmp_path / "a"), contents(tmp_path / "b"))


def test_towers_may_look_at_different_sizes(image_folder, towers, tmp_path):
    small = towers.clip.preprocessing._replace(size=16)
    clip = towers.clip._replace(
        preprocessing=small,
        forward=lambda x: towers.clip.forward(x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    )
    refs = folder_images(image_folder)[:2]
    extract(refs, TowerPair(towers.eva, clip), tmp_path / "out", FP32)
    for ref, (_, _, eva, red) in zip(refs, contents(tmp_path / "out").values(), strict=True):
        image = load_rgb(ref.data)
        torch.testing.assert_close(eva, colours(image))
        expected = to_pixels(image, 16)[:1].float().view(4, 4, 4, 4).mean((1, 3)).flatten()
        torch.testing.assert_close(red[:, 0], expected / 2)


def test_crops_can_be_cut_again_from_their_keys(image_folder, towers, tmp_path):
    refs = [ref._replace(crops=3) for ref in folder_images(image_folder)[:4]]
    settings = replace(FP32, mirror=True, seed=7, split=Split(0.5))
    assert extract(refs, towers, tmp_path / "out", settings).samples == 4 * 3 * 2
    found = contents(tmp_path / "out")
    assert list(found)[:3] == ["a/0.png#7.0", "a/0.png#7.0m", "a/0.png#7.1"]
    for key, (_, source, eva, _) in found.items():
        ref = next(ref for ref in refs if ref.key == key.partition("#")[0])
        assert source == ref.source
        torch.testing.assert_close(eva, colours(open_view(ref, key, settings)))
    mirrored = found["a/0.png#7.0m"][2].view(4, 4, 3).flip(1).reshape(16, 3)
    torch.testing.assert_close(mirrored, found["a/0.png#7.0"][2], rtol=0.1, atol=2.0)
    with pytest.raises(ValueError, match=r"expected a sample of a/0\.png, such as a/0\.png#7\.0"):
        open_view(refs[0], "a/0.png#8.0", settings)
    sides = [
        {
            k.partition("#")[0]
            for k in EmbeddingDataset(tmp_path / "out", split=s).read(range(6)).keys
        }
        for s in ("train", "heldout")
    ]
    assert not sides[0] & sides[1]


def test_unreadable_images_are_skipped_and_listed(image_folder, towers, tmp_path):
    (image_folder / "a" / "0.png").write_bytes(b"")
    whole = (image_folder / "a" / "1.png").read_bytes()
    (image_folder / "a" / "1.png").write_bytes(whole[: len(whole) // 2])
    (image_folder / "b" / "7.png").write_bytes(b"text")
    refs = folder_images(image_folder)
    gone = UnreadableImage("damaged tar: it has no end")
    refs += [refs[-1], ImageRef("x.tar", "", "x.tar", gone)]
    report = extract(refs, towers, tmp_path / "out", FP32)
    assert (report.samples, report.added) == (7, 7)
    listed = dict(skipped(tmp_path / "out"))
    assert dict(report.skipped) == listed
    assert set(listed) == {"a/0.png", "a/1.png", "b/7.png", "b/9.png", "x.tar"}
    assert listed["a/0.png"] == "empty file"
    assert "cannot identify" in listed["b/7.png"]
    assert listed["b/9.png"] == "the key appeared before"
    assert listed["x.tar"] == "damaged tar: it has no end"
    assert Manifest.load(tmp_path / "out").notes["skipped"] == 5
    assert set(contents(tmp_path / "out")) == {ref.key for ref in refs[:10]} - {
        "a/0.png",
        "a/1.png",
        "b/7.png",
    }


def odd_images(folder):
    """Files of every kind that users have, each of one colour; their colours by name."""
    folder.mkdir()
    red = {"cmyk.jpg": ("CMYK", (0, 255, 255, 0)), "one pixel.png": ("RGB", (255, 0, 0))}
    for name, (mode, colour) in red.items():
        size = (1, 1) if name.startswith("one") else (80, 60)
        Image.new(mode, size, colour).save(folder / name)
    wide = Image.new("RGB", (20_000, 40), (255, 0, 0))
    wide.save(folder / "wide.png")
    frames = [Image.new("RGB", (50, 50), colour) for colour in ("red", "lime")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((40, 40), 32_896, np.uint16)).save(folder / "16 bit.png")
    (folder / "nothing.jpg").write_bytes(b"")
    whole = (folder / "cmyk.jpg").read_bytes()
    (folder / "corrupted.jpg").write_bytes(whole[: len(whole) // 2])
    names = ("animated.gif", "cmyk.jpg", "one pixel.png", "wide.png")
    return {"16 bit.png": (128, 128, 128), **dict.fromkeys(names, (255, 0, 0))}


@pytest.mark.parametrize("crops", [0, 2])
def test_odd_images_are_right_or_listed(towers, tmp_path, crops):
    expected = odd_images(tmp_path / "odd")
    refs = [ref._replace(crops=crops) for ref in folder_images(tmp_path / "odd")]
    report = extract(refs, towers, tmp_path / "out", FP32)
    assert report.samples == len(expected) * max(1, crops)
    assert {item.key for item in report.skipped} == {"corrupted.jpg", "nothing.jpg"}
    for key, (_, photo, eva, clip) in contents(tmp_path / "out").items():
        assert key.partition("#")[0] == photo
        colour = torch.tensor(expected[photo], dtype=torch.float32)
        assert (eva - colour).abs().max() <= 3, key
        assert (clip - colour[0] / 2).abs().max() <= 1.5, key


def failing(towers, batches):
    """Towers that give up after so many batches."""
    calls = iter(range(batches))

    def forward(x):
        if next(calls, None) is None:
            raise RuntimeError("the device is gone")
        return towers.eva.forward(x)

    return TowerPair(towers.eva._replace(forward=forward), towers.clip)


@pytest.mark.parametrize("batches", [0, 1, 3, 5])
def test_going_on_after_an_interruption(image_folder, towers, tmp_path, batches):
    refs = [ref._replace(crops=2) for ref in folder_images(image_folder)]
    whole, out = tmp_path / "whole", tmp_path / "out"
    extract(refs, towers, whole, FP32)
    with pytest.raises(RuntimeError, match="the device is gone"):
        extract(refs, failing(towers, batches), out, FP32)
    assert not (out / "manifest.json").exists()
    # Batches are encoded in two threads: the one that fails may be any after the finished ones.
    assert out.exists() == any(tmp_path.glob("out/shard_*.safetensors"))
    report = extract(refs, towers, out, FP32, resume=True)
    kept = report.samples - report.added
    assert report.samples == 20 and kept % 4 == 0 and kept <= 3 * batches
    assert same(contents(out), contents(whole))
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in whole.iterdir())


def test_resuming_a_finished_folder_adds_what_is_new(image_folder, towers, tmp_path, make_image):
    out = tmp_path / "out"
    (image_folder / "b" / "5.png").rename(tmp_path / "5.png")
    (image_folder / "b" / "5.png").write_bytes(b"broken")
    assert extract(folder_images(image_folder), towers, out, FP32).samples == 9
    assert [key for key, _ in skipped(out)] == ["b/5.png"]
    again = extract(folder_images(image_folder), towers, out, FP32, resume=True)
    assert (again.samples, again.added, len(again.skipped)) == (9, 0, 1)
    assert [key for key, _ in skipped(out)] == ["b/5.png"]
    (tmp_path / "5.png").replace(image_folder / "b" / "5.png")
    assert extract(folder_images(image_folder), towers, out, FP32, resume=True) == (10, 1, ())
    assert not (out / SKIPPED_FILE).exists()
    assert set(contents(out)) == {ref.key for ref in folder_images(image_folder)}


def replace_image(folder, make_image):
    make_image(99).save(folder / "a" / "2.png")


def replace_caption(folder, make_image):
    (folder / "a" / "3.txt").write_text("four")


@pytest.mark.parametrize(
    ("change", "key"), [(replace_image, r"a/2\.png"), (replace_caption, r"a/3\.png")]
)
@pytest.mark.parametrize("crops", [0, 2])
def test_an_image_or_a_caption_that_was_replaced_is_named(
    image_folder, towers, tmp_path, make_image, change, key, crops
):
    def refs():
        return [ref._replace(crops=crops) for ref in folder_images(image_folder)]

    out = tmp_path / "out"
    answers = iter([False, False, False, True])
    with pytest.raises(Stopped):
        stop = (lambda: next(answers)) if crops else (lambda: not next(answers))
        extract(refs(), towers, out, replace(FP32, batch_size=4 if crops else 6), stop=stop)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    change(image_folder, make_image)
    with pytest.raises(ValueError, match=f"{key}: expected the image and the caption"):
        extract(refs(), towers, out, FP32, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_stopping_keeps_every_sample_so_far(image_folder, towers, tmp_path):
    refs, out = folder_images(image_folder), tmp_path / "out"
    answers = iter([False, True])
    with pytest.raises(Stopped, match="stopped with 4 samples"):
        extract(refs, towers, out, FP32, stop=lambda: next(answers))
    assert extract(refs, towers, out, FP32, resume=True) == (10, 6, ())
    assert list(contents(out)) == [ref.key for ref in refs]


def test_max_samples_counts_those_of_earlier_runs(image_folder, towers, tmp_path):
    refs, out = folder_images(image_folder), tmp_path / "out"
    assert extract(refs, towers, out, replace(FP32, max_samples=5)) == (5, 5, ())
    assert extract(refs, towers, out, replace(FP32, max_samples=5), resume=True) == (5, 0, ())
    more = replace(FP32, max_samples=8)
    assert extract(refs, towers, out, more, resume=True) == (8, 3, ())
    assert list(contents(out)) == [ref.key for ref in refs[:8]]


def test_nothing_is_left_when_nothing_can_be_read(tmp_path, towers):
    out = tmp_path / "out"
    refs = [ImageRef("a", "", "a", b""), ImageRef("b", "", "b", b"no image")]
    with pytest.raises(ValueError, match="2 images could not be read, the first is a: empty file"):
        extract(refs, towers, out, FP32)
    with pytest.raises(ValueError, match="nothing to write; there were no images"):
        extract([], towers, out, FP32)
    assert not out.exists()


def test_features_that_are_not_finite_name_their_sample(image_folder, towers, tmp_path):
    """4,000 squared is beyond fp16."""
    eva = towers.eva._replace(forward=lambda x: towers.eva.forward(x + 4000).square())
    refs = folder_images(image_folder)
    with pytest.raises(ValueError, match=r"a/0\.png.*beyond the range of fp16"):
        extract(refs, TowerPair(eva, towers.clip), tmp_path / "out", replace(FP32, dtype="fp16"))
    assert not (tmp_path / "out").exists()


def test_folders_of_something_else(image_folder, towers, tmp_path):
    refs, out = folder_images(image_folder), tmp_path / "out"
    extract(refs, towers, out, FP32)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="already holds 10 samples"):
        extract(refs, towers, out, FP32)
    with pytest.raises(ValueError, match="another data set"):
        extract(refs, towers, out, replace(FP32, include_cls=True), resume=True)
    other = TowerPair(towers.eva._replace(revision="2"), towers.clip)
    with pytest.raises(ValueError, match="eva_encoder"):
        extract(refs, other, out, FP32, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"workers": 0}, "workers: expected at least 1"),
        ({"max_samples": 0}, "max_samples: expected at least 1"),
        ({"samples_per_shard": 0}, "samples_per_shard: expected at least 1"),
        ({"dtype": "int8"}, "dtype: expected fp32, bf16, fp16"),
    ],
)
def test_bad_settings(towers, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        extract([], towers, tmp_path / "out", replace(FP32, **change))
    assert not (tmp_path / "out").exists()


def test_towers_that_do_not_fit(towers, tmp_path):
    clip = towers.clip._replace(has_cls=False)
    with pytest.raises(ValueError, match="include_cls: red has no CLS token"):
        extract([], TowerPair(towers.eva, clip), tmp_path / "x", replace(FP32, include_cls=True))
    wide = towers.clip._replace(grid=(2, 8))
    with pytest.raises(ValueError, match=r"expected one grid, got \(4, 4\), \(2, 8\)"):
        extract([], TowerPair(towers.eva, wide), tmp_path / "x", FP32)


def test_progress_counts_images(image_folder, towers, tmp_path, capsys):
    extract(folder_images(image_folder), towers, tmp_path / "out", FP32, progress=True)
    assert "10/10" in capsys.readouterr().err


def test_bytes_of_a_source_are_decoded(towers, tmp_path, image_folder):
    data = (image_folder / "a" / "0.png").read_bytes()
    extract([ImageRef("x", "", "x", data)], towers, tmp_path / "out", FP32)
    with Image.open(image_folder / "a" / "0.png") as image:
        torch.testing.assert_close(contents(tmp_path / "out")["x"][2], colours(image))
