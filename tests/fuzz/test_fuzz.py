"""Damaged files of every format: an answer or a line that says what is wrong, and nothing else.

The oracle: exit status 0, 1 or 2, which also means no traceback; one line; less than ten seconds;
bounded memory; no program started, no connection, and no file written outside the folder.
"""

import random
import resource
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from blip3o_fast.cli.main import guarded
from tests.fuzz.parsers import PARSERS

SECONDS = 10
GROWTH = 512 << 20
"""Bytes that the peak of the process may grow by while a parser reads all its inputs."""

WATCHED = (
    *("os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "socket.connect"),
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree", "open"),
)


class Watch:
    """An audit hook, which cannot be removed and is quiet outside ``inside``."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if self.folder is None or event not in WATCHED:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in (mode or "") for c in "wax+") or (mode is None and flags & 3)
            if not writes or not isinstance(path, str | bytes | Path):
                return
        if event.partition(".")[0] in ("os", "open", "shutil") and arguments:
            path = arguments[0]
            path = path.decode(errors="replace") if isinstance(path, bytes) else str(path)
            if Path(path).is_relative_to(self.folder):
                return
        self.seen.append(f"{event} {arguments!r:.200}")

    @contextmanager
    def inside(self, folder: Path):
        self.folder, self.seen = folder, []
        try:
            yield self.seen
        finally:
            self.folder = None


@pytest.fixture(scope="session")
def watch():
    return Watch()


class TooSlow(BaseException):
    """A parser took longer than it may."""


@contextmanager
def at_most(seconds):
    def stop(*_):
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("inputs", [200, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files(name, inputs, tmp_path, watch, capsys):
    parser = PARSERS[name]
    folder = tmp_path / "files"
    folder.mkdir()
    path = parser.seed(folder)
    whole = path.read_bytes()
    assert guarded(lambda: (parser.read(folder) and 0) or 0, "fuzz") == 0, "the seed is whole"
    before, statuses = peak(), set()
    for i in range(inputs):
        path.write_bytes(parser.damage(whole, random.Random(f"{name} {i}")))
        capsys.readouterr()
        with warnings.catch_warnings(), watch.inside(tmp_path) as seen, at_most(SECONDS):
            warnings.simplefilter("ignore")
            try:
                statuses.add(guarded(lambda: (parser.read(folder) and 0) or 0, "fuzz"))
            except BaseException as error:
                error.add_note(f"{name}: input {i}")
                raise
        assert not seen, (name, i, seen)
        err = capsys.readouterr().err
        assert err.count("\n") <= 1, (name, i, err)
        assert all(c.isprintable() for c in err.rstrip("\n")), (name, i, err)
    lists_them = name.startswith(("image", "captions", "webdataset"))
    assert statuses == {0} if lists_them else statuses <= {0, 1, 2} and len(statuses) > 1
    assert peak() - before < GROWTH
