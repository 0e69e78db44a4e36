"""Folders, webdataset tars and COCO."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_fast.extraction import image_sources
from blip3o_fast.extraction.image_sources import coco_images, folder_images, webdataset_images
from blip3o_fast.extraction.images import UnreadableImage, load_rgb


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(file, "PNG")
    return file.getvalue()


def colour(data):
    return tuple(np.asarray(load_rgb(data))[0, 0].tolist())


def write_tar(path: Path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_folder(image_folder):
    (image_folder / "notes.md").write_text("no image")
    (image_folder / "b" / "LOUD.JPG").write_bytes(b"")
    refs = folder_images(image_folder)
    names = [f"a/{n}.png" for n in range(5)] + [f"b/{n}.png" for n in range(5, 10)]
    assert sorted(ref.key for ref in refs) == sorted([*names, "b/LOUD.JPG"])
    assert [ref.key for ref in refs] == [ref.key for ref in folder_images(str(image_folder))]
    assert all(ref.source == ref.key and ref.data == image_folder / ref.key for ref in refs)
    assert {ref.key: ref.caption for ref in refs if ref.caption} == {"a/3.png": "three"}


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of images"):
        folder_images(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"expected image files .*\.jpg"):
        folder_images(tmp_path)


def test_webdataset(tmp_path):
    write_tar(
        tmp_path / "00000.tar",
        [
            ("red.txt", b"a red one\n"),
            ("red.png", png((255, 0, 0))),
            ("red.json", b"{}"),
            ("words.txt", b"no image here"),
            ("deep/green.v1.png", b"another extension"),
            ("deep/green.png", png((0, 255, 0))),
        ],
    )
    write_tar(tmp_path / "00001.tar", [("red.PNG", png((0, 0, 255)))], "w:gz")
    expected = [
        ("00000/red", "a red one", (255, 0, 0)),
        ("00000/deep/green", "", (0, 255, 0)),
        ("00001/red", "", (0, 0, 255)),
    ]
    for pattern in ("{00000..00001}.tar", "*.tar", "0000[01].tar"):
        refs = webdataset_images(str(tmp_path / pattern))
        assert [(r.key, r.caption, colour(r.data)) for r in refs] == expected
    assert [r.key for r in webdataset_images(str(tmp_path / "00001.tar"))] == ["00001/red"]


def test_tars_of_one_name_in_two_folders(tmp_path):
    for folder in "ab":
        write_tar(tmp_path / folder / "0.tar", [("x.png", png("red"))])
    refs = webdataset_images(str(tmp_path / "*" / "0.tar"))
    assert [ref.key for ref in refs] == ["a/0/x", "b/0/x"]


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1024, 1200, 1700, 2048, 3000, 3072, 3100])
def test_a_tar_that_breaks_off_says_so_after_what_is_whole(tmp_path, cut):
    members = [(f"{n}.png", png((n, n, n))) for n in range(3)]
    path = write_tar(tmp_path / "x.tar", members)
    path.write_bytes(path.read_bytes()[:cut])
    refs = list(webdataset_images(str(path)))
    assert isinstance(refs[-1].data, UnreadableImage)
    assert str(refs[-1].data).startswith("damaged tar")
    whole = refs[:-1]
    # A header and a block of data each; the last whole one can be lost with what follows it.
    assert cut // 1024 - 1 <= len(whole) <= cut // 1024
    assert [colour(ref.data) for ref in whole] == [(n, n, n) for n in range(len(whole))]


def test_an_oversized_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "MAX_FILE_BYTES", 200)
    path = write_tar(tmp_path / "x.tar", [("big.png", bytes(300)), ("small.png", png("red"))])
    big, small = webdataset_images(str(path))
    assert isinstance(big.data, UnreadableImage)
    assert str(big.data) == "file of 300 bytes"
    assert colour(small.data) == (255, 0, 0)


def test_webdataset_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"00001\.tar: no such tar"):
        write_tar(tmp_path / "00000.tar", [])
        webdataset_images(str(tmp_path / "{00000..00001}.tar"))
    with pytest.raises(FileNotFoundError, match="found none"):
        webdataset_images(str(tmp_path / "*.tgz"))
    with pytest.raises(ValueError, match="expected a brace range"):
        webdataset_images(str(tmp_path / "{a,b}.tar"))


def write_coco(root, images, annotations, folder="val2017"):
    (root / "annotations").mkdir(parents=True)
    (root / folder).mkdir(parents=True)
    text = json.dumps({"images": images, "annotations": annotations})
    (root / "annotations" / "captions_val2017.json").write_text(text)
    return root


@pytest.mark.parametrize("folder", ["val2017", "images/val2017"])
def test_coco(tmp_path, folder):
    images = [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}]
    annotations = [
        {"image_id": 4, "caption": " first of four "},
        {"image_id": 4, "caption": "second of four"},
        {"image_id": 7, "caption": "of an image that is not listed"},
    ]
    refs = coco_images(write_coco(tmp_path, images, annotations, folder))
    assert [(r.key, r.caption, r.source) for r in refs] == [
        ("coco_9", "", "val2017/9.jpg"),
        ("coco_4", "first of four", "val2017/4.jpg"),
    ]
    assert refs[1].data == tmp_path / folder / "4.jpg"


def test_coco_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions_val2017\.json"):
        coco_images(tmp_path)
    root = write_coco(tmp_path / "escape", [{"id": 1, "file_name": "../secret.jpg"}], [])
    with pytest.raises(ValueError, match="expected plain file names"):
        coco_images(root)
    root = write_coco(tmp_path / "keys", [{"file_name": "1.jpg"}], [])
    with pytest.raises(ValueError, match=r"expected COCO caption annotations \(KeyError: 'id'\)"):
        coco_images(root)
    (root / "annotations" / "captions_val2017.json").write_text("{")
    with pytest.raises(ValueError, match="expected COCO caption annotations"):
        coco_images(root)
    (root / "val2017").rmdir()
    with pytest.raises(FileNotFoundError, match="expected the images in val2017"):
        coco_images(root)
