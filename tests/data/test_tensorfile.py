import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from blip3o_fast.atomic import file_sha256
from blip3o_fast.data.tensorfile import (
    RowWriter,
    bits,
    empty,
    is_finite,
    read_header,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_written_files_are_read_by_the_safetensors_library(tmp_path, dtype, rows):
    eva, clip = torch.randn(rows, 3, 7).to(dtype), torch.randn(rows, 3, 5).to(dtype)
    path = tmp_path / "a.safetensors"
    writer = RowWriter(path, {"eva": (3, 7), "clip": (3, 5)}, dtype, capacity=8)
    for start in range(0, rows, 2):
        writer.append({"eva": bits(eva[start : start + 2]), "clip": bits(clip[start : start + 2])})
    size, digest = writer.commit()
    loaded = load_file(path)
    assert torch.equal(loaded["eva"], eva) and torch.equal(loaded["clip"], clip)
    assert (size, digest) == (path.stat().st_size, file_sha256(path))


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_the_safetensors_library_are_read(tmp_path, dtype):
    x = torch.randn(3, 2, 4).to(dtype)
    save_file({"eva": x}, tmp_path / "a.safetensors", metadata={"any": "thing"})
    spec = read_header(tmp_path / "a.safetensors")["eva"]
    assert spec[:2] == (dtype, (3, 2, 4))
    stored = (tmp_path / "a.safetensors").read_bytes()[spec.start : spec.stop]
    assert stored == bits(x).tobytes()


def test_moving_blocks_may_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr("blip3o_fast.data.tensorfile._BLOCK_BYTES", 13)
    eva, clip = torch.randn(6, 2), torch.randn(6, 9)
    writer = RowWriter(tmp_path / "a.safetensors", {"eva": (2,), "clip": (9,)}, torch.float32, 7)
    writer.append({"eva": bits(eva), "clip": bits(clip)})
    writer.commit()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["clip"], clip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 131_071, 131_072, 299_999])
def test_every_value_that_is_not_finite_is_seen(dtype, bad, place):
    x = torch.full((300_000,), -torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(bits(x), dtype)
    x[place] = bad
    assert not is_finite(bits(x), dtype)


def test_every_16_bit_pattern_is_judged_as_torch_judges_it():
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        expected = torch.isfinite(torch.from_numpy(patterns.view(np.int16)).view(dtype))
        got = [is_finite(patterns[i : i + 1], dtype) for i in range(1 << 16)]
        assert got == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_has_shape_dtype_and_can_be_written(dtype):
    x = empty((2, 3, 0), dtype), empty((2, 3, 4), dtype)
    assert [t.shape for t in x] == [(2, 3, 0), (2, 3, 4)] and x[1].dtype == dtype
    x[1].fill_(1)
    assert x[1].sum() == 24


def header_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


SPEC = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"eva": SPEC}, bytes(15), "expected .* bytes, got .*: truncated"),
        ({"eva": SPEC}, bytes(17), "bytes follow the last tensor"),
        ({"eva": SPEC, "clip": SPEC}, bytes(16), "clip: expected to start at"),
        ({"eva": {**SPEC, "dtype": "F64"}}, bytes(16), "eva: expected dtype .* got 'F64'"),
        ({"eva": {**SPEC, "shape": [2, 3]}}, bytes(16), "does not fill bytes"),
        ({"eva": {**SPEC, "shape": [2, -2]}}, bytes(16), "expected a list of sizes"),
        ({"eva": {**SPEC, "shape": [1 << 70, 0]}}, bytes(16), "does not fill bytes"),
        ({"eva": {**SPEC, "shape": [True, 4]}}, bytes(16), "expected a list of sizes"),
        ({"eva": {**SPEC, "data_offsets": [4, 20]}}, bytes(20), "eva: expected to start at"),
        ({"eva": {**SPEC, "data_offsets": [16]}}, bytes(16), "does not fill bytes"),
        ({"eva": {**SPEC, "dtype": ["F32"]}}, bytes(16), "TypeError"),
        ({"eva": {**SPEC, "shape": [1] * 9}}, bytes(16), "expected a list of sizes"),
        ({"eva": {**SPEC, "shape": [10**4000] * 9000}}, bytes(16), "expected a list of sizes"),
        ({"eva": {"dtype": "F32"}}, b"", "expected dtype, shape and data_offsets"),
        ({"eva": 3}, b"", "expected a JSON object, got int"),
        ([1], b"", "expected a JSON object, got list"),
        (b"{", b"", "expected the header of a safetensors file"),
        (b"\xff\xfe", b"", "expected the header of a safetensors file"),
        (b"[" * 100_000, b"", "expected the header of a safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, message):
    path = header_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert "a.safetensors: " in str(caught.value)


@pytest.mark.parametrize("length", [17, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(tmp_path, length):
    path = header_file(tmp_path / "a.safetensors", b"0123456789abcdef", length=length)
    with pytest.raises(ValueError, match="expected a header within the file's 24 bytes"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_of_a_few_bytes(tmp_path, size):
    (tmp_path / "a.safetensors").write_bytes(bytes(size))
    with pytest.raises(ValueError, match="truncated"):
        read_header(tmp_path / "a.safetensors")


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_headers_never_escape_as_another_error(tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.safetensors"
    save_file({"eva": torch.ones(2, 3, 4), "clip": torch.ones(2, 3, 5)}, path)
    raw, rng = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(200)] = rng.randrange(256)
    path.write_bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
    try:
        specs = read_header(path)
    except ValueError as error:
        assert "fuzz.safetensors" in str(error)
    else:
        assert all(8 <= spec.start <= spec.stop <= len(raw) for spec in specs.values())
