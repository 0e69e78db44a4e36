"""Runs the tests that need a GPU in many processes.

    python benchmarks/gpu_tests.py [--processes 12] [--json tests.json] [pytest's arguments]

It needs only pytest. Every process collects all tests. It then runs, one after the other, the tests
that no other process has taken. It starts at its own place in the list, because neighbouring tests
share compiled kernels. Each outcome is written at once, so a run that is stopped keeps it. If a
test ends its process, hangs, or breaks the device, a new process goes on with the other tests.

Test files whose packages are not installed are left out and listed. Exit status: 0 if every test
passed or was skipped, 77 without pytest, else 1.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

KIND = "blip3o-fast gpu tests"
FORMAT = 1
SKIPPED = 77
WANTED = {"pytest": "pytest", "pytest_timeout": "pytest_timeout", "hypothesis": "hypothesis"}
"""By module: how the name of its wheel begins."""
PLACE = "BLIP3O_FAST_TESTS"
"""The variable that gives each process the folder, its number and the number of processes."""
LAST_LINES = 30
BROKEN_DEVICE = 9
"""The exit status of a process whose device runs nothing more."""
ENDED = "ended its process"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the failures, write the record."""
    args, words = parse_arguments(arguments)
    install(args.wheels, args.site)
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed; --wheels DIR brings it")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="blip3o-fast-tests-") as name:
        run = Run(Path(name), args.processes, words, args.patience)
        return report(run, args.json)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the arguments for pytest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a test may take")
    parser.add_argument("--json", type=Path, help="where to write the record")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for what is missing")
    parser.add_argument("--site", type=Path, help="where they are installed, on the PYTHONPATH")
    return parser.parse_known_args(arguments)


def install(wheels: Path | None, site: Path | None) -> None:
    """Install missing modules from wheels. Nothing is downloaded."""
    if wheels is None:
        return
    missing = [
        module
        for module, wheel in WANTED.items()
        if importlib.util.find_spec(module) is None and list(wheels.glob(f"{wheel}-*.whl"))
    ]
    if missing:
        command = ["-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
        subprocess.run([sys.executable, *command, "--target", str(site), *missing], check=True)
        importlib.invalidate_caches()


def report(run: "Run", path: Path | None) -> int:
    """Wait until all tests are done or a signal comes; then print and write the outcomes."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        while run.goes_on():
            write(path, run.record())
            time.sleep(0.5)
    except KeyboardInterrupt as error:
        run.stopped = str(error)
        write(path, run.record())  # there may be no time left after the processes have ended
    run.end()
    content = run.record()
    write(path, content)
    for failure in content["failures"]:
        print(f"{failure['outcome'].upper()} {failure['test']}\n{failure['text']}\n")
    for index, process in enumerate(run.processes):
        said = list(read(notes(run.folder, index)))
        if not any("collected" in note for note in said) and not run.stopped:
            print(f"pytest ended with exit status {process.returncode}:")
            print(last_lines(log(run.folder, index).read_text(errors="replace")))
    for name, why in content["left_out"].items():
        print(f"left out: {name}: {why}")
    print(describe(content))
    good = not (content["failures"] or content["never_run"] or content["stopped"])
    return 0 if good and content["tests"] else 1


class Run:
    """The processes that share the tests, and the notes that they write.

    Attributes:
        processes: all that were started, by number.
        stopped: the name of the signal that ended the run, or "".
    """

    def __init__(self, folder: Path, count: int, words: Sequence[str], patience: float) -> None:
        self.folder, self.count, self.words, self.patience = folder, count, words, patience
        self.started = time.monotonic()
        self.stopped = ""
        self.processes = [self._launch(index) for index in range(count)]
        self._replaced: set[int] = set()

    def goes_on(self) -> bool:
        """Whether a process runs. Kills processes that hang; replaces those that a test ended."""
        for index, process in enumerate(list(self.processes)):
            said = notes(self.folder, index)
            if process.poll() is None and silent(said) > self.patience:
                process.kill()
                process.wait()
            if process.poll() is None or index in self._replaced:
                continue
            begun = [note for note in read(said) if "began" in note or "done" in note]
            # A process that ended before any test would do so again.
            if begun and "done" not in begun[-1]:
                self._replaced.add(index)
                (self.folder / f"taken-{begun[-1]['next']}").unlink(missing_ok=True)
                self.processes.append(self._launch(len(self.processes)))
        return any(process.poll() is None for process in self.processes)

    def end(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def record(self) -> dict[str, Any]:
        """All outcomes so far. If a process has ended during a test, the test has ended it."""
        outcomes: dict[str, str] = {}
        failures: dict[str, dict[str, str]] = {}
        left_out: dict[str, str] = {}
        tests = 0
        for index, process in enumerate(self.processes):
            running = ""
            for said in read(notes(self.folder, index)):
                if "collected" in said:
                    tests = said["collected"]
                elif "left out" in said:
                    left_out[said["left out"]] = said["why"]
                elif "done" in said:
                    running = ""
                elif "began" in said:
                    running = said["began"]
                elif "file" in said:
                    failures[said["file"]] = {
                        "test": said["file"],
                        "outcome": "error",
                        "text": said["text"],
                    }
                else:
                    running = ""
                    outcomes[said["test"]] = said["outcome"]
                    if said["outcome"] in ("failed", "error"):
                        failures[said["test"]] = said
            if running and process.poll() is not None and not self.stopped:
                outcomes[running] = ENDED
                text = f"exit status {process.returncode}"
                failures[running] = {"test": running, "outcome": ENDED, "text": text}
        return {
            "kind": KIND,
            "format": FORMAT,
            "commit": os.environ.get("BLIP3O_FAST_COMMIT"),
            "processes": self.count,
            "seconds": round(time.monotonic() - self.started, 1),
            "stopped": self.stopped,
            "tests": tests,
            "outcomes": dict(Counter(outcomes.values())),
            "never_run": tests - len(outcomes),
            "failures": list(failures.values()),
            "left_out": left_out,
        }

    def _launch(self, index: int) -> "subprocess.Popen[bytes]":
        here = str(Path(__file__).resolve().parent)
        paths = [here, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            PLACE: json.dumps([str(self.folder), index, self.count]),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": "1",
        }
        # All processes need the same order of tests, and must not start processes of their own.
        options = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
        options += ["-p", "gpu_tests", "--continue-on-collection-errors"]
        with log(self.folder, index).open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", *options, *self.words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


def log(folder: Path, index: int) -> Path:
    """The file for the output of a process."""
    return folder / f"{index}.log"


def notes(folder: Path, index: int) -> Path:
    """The file for the notes of a process, a line of JSON each."""
    return folder / f"{index}.jsonl"


def silent(path: Path) -> float:
    """Seconds since the last note of a process; 0 before the first one."""
    return time.time() - path.stat().st_mtime if path.is_file() else 0.0


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The notes of a process, without one that is not complete yet."""
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Replace the record whole."""
    if path is not None:
        draft = path.with_name(f".{path.name}.part")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(path)


def describe(content: dict[str, Any]) -> str:
    """A line for a terminal."""
    parts = [f"{count} {outcome}" for outcome, count in sorted(content["outcomes"].items())]
    if content["never_run"]:
        parts.append(f"{content['never_run']} not run")
    stopped = f", stopped by {content['stopped']}" if content["stopped"] else ""
    tests, seconds = content["tests"], content["seconds"]
    return f"{', '.join(parts) or 'none'} of {tests} tests, {seconds:.0f} s{stopped}"


def last_lines(text: str) -> str:
    """The end of a text."""
    return "\n".join(text.rstrip().splitlines()[-LAST_LINES:])


# The rest of this file is a plugin: pytest calls it in each process.


def note(**fields: Any) -> None:
    """Write a note at once."""
    folder, index, _ = json.loads(os.environ[PLACE])
    with notes(Path(folder), index).open("a") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_collectreport(report: Any) -> None:
    """Note a file that cannot be imported."""
    if not report.failed:
        return
    text = str(report.longrepr)
    missing = re.findall("ModuleNotFoundError: (.*)", text)
    if missing:
        note(**{"left out": report.nodeid, "why": missing[-1]})
    else:
        note(file=report.nodeid, text=last_lines(text))


def pytest_runtestloop(session: Any) -> bool:
    """Run the tests that this process takes, instead of all of them."""
    items = sorted(session.items, key=lambda item: item.nodeid)
    note(collected=len(items))
    numbers = taken(len(items))
    number = next(numbers, None)
    while number is not None:
        following = next(numbers, None)  # pytest keeps the fixtures that both need
        item, after = items[number], None if following is None else items[following]
        note(began=item.nodeid, next=following)
        failed = session.testsfailed
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed > failed and is_broken():
            os._exit(BROKEN_DEVICE)
        number = following
    note(done=True)
    return True


def taken(tests: int) -> Iterator[int]:
    """The numbers of tests that no other process has taken, from this process's place on."""
    folder, index, count = json.loads(os.environ[PLACE])
    own = tests * (index % count) // count
    for number in (*range(own, tests), *range(own)):
        with contextlib.suppress(FileExistsError):
            (Path(folder) / f"taken-{number}").touch(exist_ok=False)
            yield number


def is_broken() -> bool:
    """Whether the device runs nothing more in this process, as after an illegal access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of a test, or of its setup or teardown if that fails or skips."""
    if report.when != "call" and report.passed:
        return
    outcome = "error" if report.when != "call" and report.failed else report.outcome
    text = last_lines(str(report.longrepr)) if report.failed else ""
    note(test=report.nodeid, outcome=outcome, text=text)


if __name__ == "__main__":
    sys.exit(main())
