"""Folders, webdataset tars and COCO."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hostile import HOSTILE_TARS, within
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
            ("deep/green.v1.png", png((0, 128, 0))),
            ("deep/green.png", png((0, 255, 0))),
        ],
    )
    write_tar(tmp_path / "00001.tar", [("red.PNG", png((0, 0, 255)))], "w:gz")
    expected = [
        ("00000/red", "a red one", (255, 0, 0)),
        ("00000/deep/green.v1", "", (0, 128, 0)),
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
    with pytest.raises(FileNotFoundError, match="a brace range looks like"):
        webdataset_images(str(tmp_path / "{a,b}.tar"))
    for pattern in ("{05..01}.tar", "{0..999999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(ValueError, match="at most 1000000 tars"):
            webdataset_images(str(tmp_path / pattern))


@pytest.mark.parametrize("name", ["photos [2020]/a.tar", "set{v1}/a.tar", "{05..01}.tar"])
def test_what_exists_is_a_path(tmp_path, name):
    write_tar(tmp_path / name, [("x.png", png("red"))])
    assert [ref.key.rpartition("/")[2] for ref in webdataset_images(str(tmp_path / name))] == ["x"]


def test_ranges_below_a_folder_with_brackets(tmp_path):
    for n in range(2):
        write_tar(tmp_path / "photos [2020]" / f"{n}.tar", [("x.png", png("red"))])
    refs = webdataset_images(str(tmp_path / "photos [2020]" / "{0..1}.tar"))
    assert [ref.key for ref in refs] == ["0/x", "1/x"]


def listed(refs):
    return {ref.key: str(ref.data) for ref in refs if isinstance(ref.data, UnreadableImage)}


def test_names_with_dots(tmp_path):
    members = [
        *(("22.05.png", png("red")), ("22.05.txt", b"of the 22nd"), ("22.06.png", png("lime"))),
        *(("b.1.jpg", png("blue")), ("b.txt", b"of another b"), ("b.1.TXT", b"of b.1")),
    ]
    refs = list(webdataset_images(str(write_tar(tmp_path / "x.tar", members))))
    expected = [("x/22.05", "of the 22nd"), ("x/22.06", ""), ("x/b.1", "of b.1")]
    assert [(ref.key, ref.caption) for ref in refs] == expected


@pytest.mark.parametrize("kind", ["avif", "BMP", "gif", "jfif", "pgm", "ppm", "tif", "TIFF"])
def test_tars_and_folders_hold_the_same_types(tmp_path, kind):
    path = write_tar(tmp_path / "x.tar", [(f"a.{kind}", png("red")), ("a.Txt", b"red")])
    (ref,) = webdataset_images(str(path))
    assert (ref.caption, colour(ref.data)) == ("red", (255, 0, 0))
    (tmp_path / f"a.{kind}").write_bytes(png("red"))
    (tmp_path / "a.Txt").write_text("red")
    (ref,) = folder_images(tmp_path)
    assert (ref.caption, colour(ref.data)) == ("red", (255, 0, 0))


def test_companions_of_macos_are_no_samples(tmp_path):
    members = [("a.jpg", png("red")), ("._a.jpg", b"x"), ("._a.txt", b"y"), ("a.txt", b"red")]
    (ref,) = webdataset_images(str(write_tar(tmp_path / "x.tar", members)))
    assert (ref.key, ref.caption) == ("x/a", "red")
    for name, data in members:
        (tmp_path / name).write_bytes(data)
    assert [(ref.key, ref.caption) for ref in folder_images(tmp_path)] == [("a.jpg", "red")]


def test_what_is_left_out_is_listed(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:

        def add(name, data=b"", kind=tarfile.REGTYPE, link=""):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, link
            tar.addfile(info, io.BytesIO(data))

        add("a.png", png("red"))
        add("a.png", png("lime"))
        add("a.webp", png("blue"))
        add("hard.png", kind=tarfile.LNKTYPE, link="a.png")
        add("soft.png", kind=tarfile.SYMTYPE, link="a.png")
        add("stray.png", kind=tarfile.LNKTYPE, link="../../secret.png")
        add("b.heic", b"phone")
        add("notes.json", b"{}")
    refs = list(webdataset_images(str(path)))
    colours = {r.key: colour(r.data) for r in refs if isinstance(r.data, bytes)}
    assert colours == {"x/a": (255, 0, 0), "x/hard": (0, 255, 0)}  # the last a.png is linked to
    assert listed(refs) == {
        "x/a.png": "the sample x/a has another image, a.png",
        "x/a.webp": "the sample x/a has another image, a.png",
        "x/soft.png": "a link or a device",
        "x/stray.png": "a link or a device",
        "x/b.heic": "images of type heic are not read",
    }
    (tmp_path / "b.HEIC").write_bytes(b"phone")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    refs = folder_images(tmp_path)
    assert listed(refs) == {"b.HEIC": "images of type heic are not read"}
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        load_rgb(refs[1].data)


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    root = tmp_path / "root"
    for folder in (elsewhere, root / "own"):
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(png("red"))
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "own")
    (root / "own" / "loop").symlink_to(root)
    (elsewhere / "loop").symlink_to(root)
    assert [ref.key for ref in folder_images(root)] == ["linked/x.png", "own/x.png"]


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_captions_in_common_encodings(tmp_path, suffix, encoding):
    data = "Hündchen am Fluß\r\n".encode(encoding)
    path = write_tar(tmp_path / "x.tar", [("a.png", png("red")), (f"a{suffix}", data)])
    assert [ref.caption for ref in webdataset_images(str(path))] == ["Hündchen am Fluß"]
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / f"a{suffix}").write_bytes(data)
    assert [ref.caption for ref in folder_images(tmp_path)] == ["Hündchen am Fluß"]


def test_a_caption_may_break_off_within_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "MAX_CAPTION_BYTES", 4)
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "a.txt").write_bytes("abcü".encode())
    assert [ref.caption for ref in folder_images(tmp_path)] == ["abc\ufffd"]


@pytest.mark.parametrize("make", HOSTILE_TARS, ids=lambda make: make.__name__)
def test_hostile_headers(tmp_path, make):
    path = tmp_path / "x.tar"
    path.write_bytes(make())
    with within(seconds=5, megabytes=100):
        refs = list(webdataset_images(str(path)))
    assert listed(refs)["x.tar"].startswith("damaged tar: ")
    assert HOSTILE_TARS[make] in listed(refs)["x.tar"]


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
    path = root / "annotations" / "captions_val2017.json"
    for text in ("{", "[1]", '{"annotations": 3}', '{"annotations": [3], "images": []}', "\xff"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"captions_val2017\.json: expected"):
            coco_images(root)
    (root / "val2017").rmdir()
    with pytest.raises(FileNotFoundError, match="expected the images in val2017"):
        coco_images(root)
