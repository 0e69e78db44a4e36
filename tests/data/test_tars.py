"""Tars of arrays in webdataset's layout, read in place."""

import io
import tarfile

import numpy as np
import pytest
from hostile import HOSTILE_TARS, within

from blip3o_fast.data.conversion_sources import npy_source
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.data.tars import tar_source


def npy(x, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x, **options)
    return buffer.getvalue()


def features(seed=0, tokens=4, width=3, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((tokens, width)).astype(dtype)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key, seed=0, **options):
    return [
        (f"{key}.eva.npy", npy(features(seed, width=6, **options))),
        (f"{key}.clip.npy", npy(features(seed, width=5, **options))),
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_samples_are_read_exactly(tmp_path, dtype):
    members = [m for i in range(3) for m in sample(f"k{i}", i, dtype=dtype)]
    members += [("k0.txt", b" a cat\n"), ("k2.caption", "ein Hündchen".encode())]
    source = tar_source(write_tar(tmp_path / "a.tar", members))
    expected = [SampleRecord("k0", "a cat"), SampleRecord("k1"), SampleRecord("k2", "ein Hündchen")]
    assert source.records == expected
    for i in range(3):
        assert np.array_equal(
            source.eva.rows(i, i + 1)[0].numpy(), features(i, width=6, dtype=dtype)
        )
    clip = np.stack([features(i, width=5, dtype=dtype) for i in range(3)])
    assert np.array_equal(source.clip.rows(0, 3).numpy(), clip)


def test_the_order_of_members_does_not_pair_strangers(tmp_path):
    a, b = sample("a", 1), sample("b", 2)
    members = [b[1], a[0], b[0], a[1], ("b.jpg", b"not read"), ("README", b"nor this")]
    source = tar_source(write_tar(tmp_path / "a.tar", members))
    rows = {r.key: i for i, r in enumerate(source.records)}
    for key, seed in (("a", 1), ("b", 2)):
        i = rows[key]
        assert np.array_equal(source.eva.rows(i, i + 1)[0].numpy(), features(seed, width=6))
        assert np.array_equal(source.clip.rows(i, i + 1)[0].numpy(), features(seed, width=5))


def test_keys_keep_their_folders_and_harm_nothing(tmp_path):
    members = sample("../../etc/x", 1) + sample("d/x", 2) + sample("/abs", 3)
    before = sorted(tmp_path.rglob("*"))
    path = write_tar(tmp_path / "a.tar", members)
    keys = [r.key for r in tar_source(path).records]
    assert keys == ["../../etc/x", "d/x", "/abs"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_one_tower_alone(tmp_path):
    source = tar_source(write_tar(tmp_path / "a.tar", sample("a")[:1]))
    assert source.clip is None and source.eva.shape == (1, 4, 6)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x")], r"expected members KEY\.eva\.npy and KEY\.clip\.npy, got none"),
        (sample("a") + sample("b")[:1], "'b': expected both"),
        (sample("a") + sample("a"), r"a\.eva\.npy is there twice"),
        ([("a.eva.npy", b"words")], r"a\.eva\.npy: expected a \.npy array"),
        ([("a.eva.npy", b"")], r"a\.eva\.npy: expected a \.npy array"),
        ([("a.eva.npy", npy(features())[:-4])], r"expected 48 bytes of elements, got 44"),
        ([("a.eva.npy", npy(features()) + b"x")], r"expected 48 bytes of elements, got 49"),
        ([("a.eva.npy", npy(features()[None]))], r"row-major array \[T, width\], got shape \[1, 4"),
        ([("a.eva.npy", npy(np.asfortranarray(features())))], "row-major array"),
        ([("a.eva.npy", npy(features().astype(np.int64)))], "expected floating point, got <i8"),
        (
            [("a.eva.npy", npy(np.array([["x"]], object), allow_pickle=True))],
            r"expected floating point, got \|O",
        ),
        (sample("a") + sample("b", tokens=5), r"sample 1: expected \[4, 6\] of <f4, got \[5, 6\]"),
        (sample("a") + sample("b", dtype=np.float16), "sample 1: expected .* of <f4, got .* <f2"),
    ],
)
def test_tars_that_do_not_fit(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=rf"a\.tar: .*{message}"):
        tar_source(path)


def test_compressed(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("a"), "w:gz")
    with pytest.raises(ValueError, match=r"a\.tar: expected an uncompressed, complete tar"):
        tar_source(path)


@pytest.mark.parametrize("cut", [0, 100, 512, 700, 1024, 1600, 2048])
def test_truncated(tmp_path, cut):
    path = write_tar(tmp_path / "a.tar", sample("a"))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.tar: "):
        tar_source(path)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "secret.npy").write_bytes(npy(features()))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind, target in ((tarfile.SYMTYPE, "secret.npy"), (tarfile.LNKTYPE, "secret.npy")):
            info = tarfile.TarInfo("a.eva.npy")
            info.type, info.linkname = kind, target
            tar.addfile(info)
    with pytest.raises(ValueError, match=r"a\.tar: a\.eva\.npy: .*got a link or a device"):
        tar_source(path)


def test_a_hard_link_has_the_data_of_the_member_that_it_links_to(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, sample("a"))
    with tarfile.open(path, "a") as tar:
        for kind in ("eva.npy", "clip.npy"):
            info = tarfile.TarInfo(f"b.{kind}")
            info.type, info.linkname = tarfile.LNKTYPE, f"a.{kind}"
            tar.addfile(info)
    source = tar_source(path)
    assert [record.key for record in source.records] == ["a", "b"]
    assert np.array_equal(source.eva.rows(1, 2)[0].numpy(), features(0, width=6))


def test_names_with_dots_and_capitals(tmp_path):
    members = [*sample("photo_1.5"), *sample("B", 1)]
    members[2:] = [(name.upper(), data) for name, data in members[2:]]
    members += [("photo_1.5.TXT", "half".encode("utf-16")), ("._B.eva.npy", b"macOS")]
    source = tar_source(write_tar(tmp_path / "a.tar", members))
    assert source.records == [SampleRecord("photo_1.5", "half"), SampleRecord("B")]


@pytest.mark.parametrize("make", HOSTILE_TARS, ids=lambda make: make.__name__)
def test_hostile_headers(tmp_path, make):
    path = tmp_path / "a.tar"
    path.write_bytes(make())
    message = rf"a\.tar: .*{HOSTILE_TARS[make]}"
    with within(seconds=5, megabytes=100), pytest.raises(ValueError, match=message):
        tar_source(path)


@pytest.mark.parametrize(
    "text",
    [
        *("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}", "(" * 9000, "1" * 9000),
        *("{'descr': '<f4', 'fortran_order': False, 'shape': (10**30, 4)}", "'" * 3, "\x00"),
        "{'descr': [('a', '<f4', (1 << 62, 1))], 'fortran_order': False, 'shape': (1, 4)}",
        "{'descr': '<f99', 'fortran_order': False, 'shape': (1, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 4)}",
        "{'descr': '<f4', 'fortran_order': 7, 'shape': [1, 4]}",
    ],
)
def test_headers_of_arrays_that_no_array_has(tmp_path, text):
    header = text.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)
    path = write_tar(tmp_path / "a.tar", [("k.eva.npy", data)])
    with pytest.raises(ValueError, match=r"a\.tar: k\.eva\.npy: expected"):
        tar_source(path)
    (tmp_path / "eva.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"eva\.npy: "):
        npy_source(tmp_path)
