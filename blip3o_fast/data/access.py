"""Reading stretches of a file at any place, by any number of threads.

Shards are read with positioned reads and not through memory maps, for four reasons. Linux allows a
process 65530 maps by default (``vm.max_map_count``). Page tables grow by 8 bytes for every 4 KiB
that is read through a map. A map of a file that was truncated kills the process. Python keeps a
file descriptor open for each map anyway.
"""

import os
import threading
import weakref
from pathlib import Path

import numpy as np


class RandomAccessFile:
    """A file open for reading; it closes when the last reference to it goes.

    Attributes:
        path: where it lies.
        size: bytes, when it was opened.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path.open("rb", buffering=0)
        self._file = file
        self._seek_and_read = threading.Lock()  # for systems without positioned reads
        weakref.finalize(self, file.close)
        self.size = os.fstat(file.fileno()).st_size

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill a contiguous array with the bytes from ``start`` on, without the interpreter lock.

        Raises:
            ValueError: naming the file, if it ends too early.
        """
        assert out.flags.c_contiguous
        left = out.reshape(-1).view(np.uint8).data
        while left:
            count = self._read(left, start)
            if not count:
                raise ValueError(
                    f"{self.path.name}: expected {len(left)} more bytes at {start}, got the end "
                    "of the file: truncated while in use"
                )
            left, start = left[count:], start + count

    def will_read(self, start: int, size: int) -> None:
        """Ask the system to fetch a stretch while the caller does something else."""
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def _read(self, out: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], start)
        with self._seek_and_read:
            self._file.seek(start)
            return self._file.readinto(out) or 0
