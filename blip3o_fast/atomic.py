"""Files that appear whole or not at all.

A file is written under a hidden temporary name in its own folder, flushed to the disk and renamed
over its final name; then the folder itself is flushed. A reader, or a restart after a crash, sees
the old file or the new one and never a part.

Here, too, is what a file is known by (its SHA-256), and the lock of a folder that is written to.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from blip3o_fast.errors import OptionError

TEMPORARY_SUFFIX = ".tmp"


class PendingFile:
    """A binary file, readable and writable, that takes its name only on ``commit``.

    As a context manager it commits on success and discards on any exception.

    Args:
        path: the final name; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_path(path)
        # Typed as BinaryIO: the mode makes it an io.BufferedRandom.
        self.file = cast(BinaryIO, self.temporary.open("w+b"))

    def write(self, data: bytes | memoryview, offset: int | None = None) -> None:
        """Write at ``offset`` (bytes; default: where the last write ended).

        Raises:
            OSError: naming the final file, for example when the disk is full.
        """
        try:
            if offset is not None:
                self.file.seek(offset)
            self.file.write(data)
        except OSError as error:
            raise write_error(error, self.path) from error

    def commit(self) -> None:
        """Flush to the disk and rename; on failure the temporary file is removed."""
        try:
            self.file.close()
            settle(self.temporary, self.path)
        except OSError as error:
            self.discard()
            raise write_error(error, self.path) from error

    def discard(self) -> None:
        """Remove what was written; the final name is untouched."""
        # A full disk fails the flush inside close(); those bytes are unwanted, and the file closes.
        with contextlib.suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, whole or not at all."""
    with PendingFile(path) as pending:
        pending.write(data)


def write_json(path: Path, content: Any, *, indent: int = 1) -> None:
    """Replace ``path`` by ``content`` as JSON, whole or not at all."""
    write_atomically(path, (json_text(content, indent=indent) + "\n").encode())


def json_text(content: Any, *, indent: int | None = None) -> str:
    """``content`` as JSON. NaN and infinities, which JSON does not have, become null."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def temporary_path(path: Path) -> Path:
    """The hidden name, of this process, under which ``path`` is written."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def settle(temporary: Path, path: Path) -> None:
    """Flush a file that is written and closed to the disk, and rename it to ``path``."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete the temporary files that a killed writer left for names that match ``pattern``."""
    for path in folder.glob(f".{pattern}.*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a folder that is written to; the system releases it when the process ends.

    The folder is made if need be, and removed again if nothing was written. Without effect on
    Windows and on file systems without locks, such as some network ones.

    Args:
        folder: that is written to.
        shared: let others in that share it as well.

    Raises:
        OptionError: if another process holds it, as after a job was queued twice.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _flocked(folder, shared):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def _flocked(folder: Path, shared: bool) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"{folder}: expected a folder that nobody else writes to, and another process "
                "does; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL):
                raise
        yield
    finally:
        os.close(handle)


def write_error(error: OSError, path: Path) -> OSError:
    """``error`` with the name of the file that could not be written."""
    return OSError(error.errno, f"cannot write {path.name}: {error.strerror}", str(path.parent))
