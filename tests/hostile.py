"""Files that want too much, and a bound on what reading them may take."""

import io
import tarfile
import time
import tracemalloc
from contextlib import contextmanager


@contextmanager
def within(seconds, megabytes):
    """Fails if the block takes longer or allocates more."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        taken, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert taken < seconds
    assert peak < megabytes << 20


def header(name="a.png", size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data):
    return data + bytes(-len(data) % 512)


def negative_size():
    return header(size=-512) + header("b.eva.npy") + bytes(1024)


def negative_size_by_pax():
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"size": "-1024"}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


def long_names_of_long_names():
    return padded(header("@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + padded(b"name\0")) * 3000


def pax_headers_of_pax_headers():
    return (header("x", 11, tarfile.XHDTYPE) + padded(b"11 path=abc")) * 3000


def a_name_of_gigabytes():
    return header("@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME) + bytes(2048)


def random_bytes():
    return bytes(i * i % 251 for i in range(4096))


def a_tar_that_breaks_off():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 4096
        tar.addfile(info, io.BytesIO(bytes(4096)))
    return buffer.getvalue()[:2000]


HOSTILE_TARS = {
    negative_size: "a size of -512 bytes",
    negative_size_by_pax: "a size of -1024 bytes",
    long_names_of_long_names: "more than 8 headers of one member",
    pax_headers_of_pax_headers: "more than 8 headers of one member",
    a_name_of_gigabytes: "a header of 1099511627776 bytes",
    random_bytes: "",
    a_tar_that_breaks_off: "",
}
"""What makes them, and what is said of them."""
