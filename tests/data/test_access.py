import os
from pathlib import Path

import numpy as np
import pytest

from blip3o_fast.data.access import RandomAccessFile

DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file.bin").write_bytes(bytes(range(200)))
    return tmp_path / "file.bin"


@pytest.fixture(params=["preadv", "seek"])
def system(request, monkeypatch):
    """With and without reads that take an offset, as on Windows."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv")


@pytest.mark.usefixtures("system")
def test_any_stretch_in_any_order(path):
    file = RandomAccessFile(path)
    assert file.size == 200
    for start, shape in ((150, (5, 10)), (0, (2, 3, 4)), (199, (1,)), (7, (0,))):
        out = np.empty(shape, np.uint8)
        file.will_read(start, out.size)
        file.read_into(out, start)
        assert out.ravel().tolist() == list(range(start, start + out.size))
    wide = np.empty(3, np.uint16)
    file.read_into(wide, 4)
    assert wide.tobytes() == bytes(range(4, 10))


@pytest.mark.usefixtures("system")
def test_the_end_is_an_error_that_names_the_file(path):
    with pytest.raises(ValueError, match=r"file.bin: expected 2 more bytes at 200, got the end"):
        RandomAccessFile(path).read_into(np.empty(12, np.uint8), 190)


def test_a_read_that_the_system_cuts_short_goes_on(path, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, out, start: whole(fd, [out[0][:7]], start))
    out = np.empty(100, np.uint8)
    RandomAccessFile(path).read_into(out, 50)
    assert out.tolist() == list(range(50, 150))


def test_only_contiguous_memory_is_filled(path):
    with pytest.raises(AssertionError):
        RandomAccessFile(path).read_into(np.empty((4, 4), np.uint8)[:, :2], 0)


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="counts descriptors")
def test_it_closes_when_it_is_forgotten(path):
    before = len([*DESCRIPTORS.iterdir()])
    files = [RandomAccessFile(path) for _ in range(5)]
    assert len([*DESCRIPTORS.iterdir()]) == before + 5
    del files
    assert len([*DESCRIPTORS.iterdir()]) == before
