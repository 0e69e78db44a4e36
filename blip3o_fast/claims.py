"""Units of work that several processes share out among themselves, through a folder they all see.

Whoever holds the lock of a unit works on it. Locks are those of ``fcntl`` on single bytes of one
hidden file: the system releases them when a process ends, however it ends, and they work between
machines on a network file system that has locks (NFS 4; Lustre with ``-o flock``). The file is
there only while there is work. A process loses its locks when it closes the file, however often it
has it open, so nothing else may open it.

Processes that overlap in time are one run. Each run has a name, so that what an earlier run left
can be told from what this one has done.
"""

import os
import secrets
from pathlib import Path
from typing import Self

from blip3o_fast.atomic import remove_leftovers
from blip3o_fast.errors import OptionError

CLAIMS_FILE = ".claims"
_GATE, _PRESENCE, _FIRST_UNIT = 0, 1, 2  # bytes of the file that are locked
_NAME = 16  # bytes of a run's name


class Claims:
    """This process among those that share the work in a folder; left with its ``with`` block.

    Args:
        folder: which exists, and in which nobody else writes.
        plan: a digest of what all processes must agree on.

    Attributes:
        run: name of the run.

    Raises:
        OptionError: if the others have another plan, or the file system has no locks.
    """

    def __init__(self, folder: Path, plan: bytes) -> None:
        self._path = folder / CLAIMS_FILE
        self._open()
        try:
            if self._lock(_PRESENCE):
                os.pwrite(self._file.fileno(), secrets.token_bytes(_NAME) + plan, 0)
                remove_leftovers(folder, "*")  # of processes that were killed
            self._lock(_PRESENCE, shared=True)
            content = os.pread(self._file.fileno(), _NAME + len(plan), 0)
            self.run = content[:_NAME].hex()
            if content[_NAME:] != plan:
                raise OptionError(
                    f"{folder}: expected the same images and settings as the processes that are "
                    "at work there, got others"
                )
            self._unlock(_GATE)
        except BaseException:
            self._file.close()
            raise

    def take(self, unit: int) -> bool:
        """Claim a unit, unless another process has it."""
        return self._lock(_FIRST_UNIT + unit)

    def release(self, unit: int) -> None:
        """Give a unit back."""
        self._unlock(_FIRST_UNIT + unit)

    def is_last(self) -> bool:
        """Whether all others have left; nobody can join then, until ``go_on``.

        A process that is not the last one has itself left when this returns.
        """
        self._lock(_GATE, wait=True)
        if self._lock(_PRESENCE):
            return True
        self._file.close()
        return False

    def go_on(self) -> None:
        """Work on, and let others join again; only after ``is_last``."""
        self._lock(_PRESENCE, shared=True)
        self._unlock(_GATE)

    def remove(self) -> None:
        """Nothing is left to share out; only after ``is_last``."""
        self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> None:
        """Open the file and pass its gate; again, if its last process removed it meanwhile."""
        while True:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file = os.fdopen(handle, "r+b", buffering=0)
            try:
                self._lock(_GATE, wait=True)
                if self._path.exists() and os.path.samestat(os.fstat(handle), self._path.stat()):
                    return
            except BaseException:
                self._file.close()
                raise
            self._file.close()

    def _lock(self, byte: int, *, shared: bool = False, wait: bool = False) -> bool:
        try:
            import fcntl
        except ImportError:
            raise OptionError(
                "several processes: expected a system with the locks of fcntl; start a single one"
            ) from None
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind if wait else kind | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise OptionError(
                f"{self._path.parent}: several processes: expected a file system with locks, got "
                f"{error.strerror!r}; start a single process"
            ) from error
        return True

    def _unlock(self, byte: int) -> None:
        import fcntl

        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
