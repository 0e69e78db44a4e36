"""Rows of other formats, and the folders of ``.npy`` files that hold them."""

import json

import numpy as np
import pytest
import torch

from blip3o_fast.data.conversion_sources import Source, TensorRows, npy_source
from blip3o_fast.data.sidecar import SampleRecord


def features(samples=5, tokens=4, width=3, dtype=np.float32):
    return np.random.default_rng(width).standard_normal((samples, tokens, width)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pairs_are_read_exactly(tmp_path, dtype, order):
    arrays = {"eva": features(width=6, dtype=dtype), "clip": features(width=5, dtype=dtype)}
    for name, x in arrays.items():
        np.save(tmp_path / f"{name}.npy", np.asarray(x, order=order))
    source = npy_source(tmp_path)
    assert np.array_equal(source.eva.rows(0, 5).numpy(), arrays["eva"])
    assert np.array_equal(source.clip.rows(2, 4).numpy(), arrays["clip"][2:4])
    assert [r.key for r in source.records] == [f"row_{i:08d}" for i in range(5)]
    assert source.has_cls is None and source.tokens == 4


@pytest.mark.parametrize("name", ["eva", "clip"])
def test_one_tower_alone(tmp_path, name):
    np.save(tmp_path / f"{name}.npy", features())
    source = npy_source(tmp_path)
    assert (source.eva is None, source.clip is None) == (name != "eva", name != "clip")


def test_records_beside_the_arrays(tmp_path):
    np.save(tmp_path / "eva.npy", features(2))
    lines = [{"key": "a", "caption": "x", "source": "p.jpg"}, {"key": "b"}]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert npy_source(tmp_path).records == [SampleRecord("a", "x", "p.jpg"), SampleRecord("b")]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ('{"key": "a"}\n', r"\[2, 4, 3\] and 1 records"),
        ('{"key": "a"}\n{"key": ""}\n', "row 1: expected a key, got ''"),
        ('{"key": "a"}\nwords\n', "row 1: corrupted record"),
    ],
)
def test_records_that_do_not_fit(tmp_path, records, message):
    np.save(tmp_path / "eva.npy", features(2))
    (tmp_path / "records.jsonl").write_text(records)
    with pytest.raises(ValueError, match=message):
        npy_source(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (features()[0], r"eva\.npy: expected an array \[n, T, width\], got \[4, 3\]"),
        (features().astype(np.int32), "expected floating point, got <i4"),
        (features(0), "expected samples"),
        (np.array([[["a"]]], dtype=object), r"expected floating point, got \|O"),
        (np.zeros((1, 1, 1), [("a", "f4")]), r"expected floating point, got \|V4"),
    ],
)
def test_arrays_that_are_something_else(tmp_path, array, message):
    np.save(tmp_path / "eva.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        npy_source(tmp_path)


def test_an_archive_of_arrays(tmp_path):
    np.savez(tmp_path / "eva.npz", eva=features())
    (tmp_path / "eva.npz").rename(tmp_path / "eva.npy")
    with pytest.raises(ValueError, match=r"expected a \.npy array"):
        npy_source(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 60, 200])
def test_a_truncated_array(tmp_path, length):
    np.save(tmp_path / "eva.npy", features())
    data = (tmp_path / "eva.npy").read_bytes()
    (tmp_path / "eva.npy").write_bytes(data[:length])
    with pytest.raises(ValueError, match=r"eva\.npy: (expected a .npy array|truncated)"):
        npy_source(tmp_path)


@pytest.mark.parametrize(
    ("eva", "clip", "records", "message"),
    [
        ((3, 4, 6), (3, 5, 2), 3, r"got \[3, 4, 6\] and \[3, 5, 2\]"),
        ((3, 4, 6), (2, 4, 2), 3, r"got \[3, 4, 6\] and \[2, 4, 2\]"),
        ((3, 4), None, 3, r"got \[3, 4\]"),
        ((3, 4, 6), None, 2, r"got \[3, 4, 6\] and 2 records"),
        ((3, 0, 6), None, 3, "one record each"),
        (None, None, 0, "got "),
    ],
)
def test_towers_that_do_not_fit(eva, clip, records, message):
    rows = [None if shape is None else TensorRows(torch.zeros(shape)) for shape in (eva, clip)]
    with pytest.raises(ValueError, match=f"x: expected .*{message}"):
        Source("x", [SampleRecord(str(i)) for i in range(records)], *rows)
