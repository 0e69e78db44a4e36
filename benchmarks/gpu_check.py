"""Checks and measures this checkout on a machine with a GPU, in less than ten minutes.

    benchmarks/gpu_check.sh OUT [options]

Needs the Python that has torch (``PYTHON``, default python3) and a copy of the checkout. Needs no
git, network or installation. The steps, the most valuable first:

    environment       versions, driver, clocks, and the implementation of each op
    build             the CUDA C++ kernels, if there is nvcc, at the same time as the next step
    smoke             an evaluation, a graph, a training step and Triton's kernels work at all
    kernels           the CUDA C++ kernels work at all
    evaluation        bench --quick: evaluations and translations
    ops               bench --quick: every op, attention, a block
    training          bench --quick: a training step, the loader
    profile           one evaluation, launch by launch
    profile_training  one training step, launch by launch
    tests             pytest -m "gpu and not slow", in 12 processes
    memcheck          every op under compute-sanitizer
    racecheck         the same for races in shared memory

and, only if ``--steps`` names it, ``long``: 2,000 training steps in a row.

If a step fails, hangs or is killed, the others still run. After each step, and every ``REFRESH``
seconds, ``OUT/results.tar.gz`` is replaced. It holds ``summary.json`` and, of every step so far,
the JSON, the pictures and the end of the log. OUT holds nothing else.

Exit status: 0 if no step failed, 1 if one did, 2 for bad arguments, 128 and the number of the
signal that ended the check.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KIND = "blip3o-fast gpu check"
FORMAT = 1
ARCHIVE = "results.tar.gz"
TOTAL = 580
"""Seconds for all steps: ten minutes, less the time to end the last one."""
LEAST = 5
"""A step that would get fewer seconds is skipped."""
GRACE = 5
"""Seconds between asking a step to end and killing it."""
REFRESH = 15
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SKIPPED = 77
"""The exit status of a step that had nothing to do."""
BROKE = 3
"""The exit status of ``smoke.py`` if a kernel ended its process."""
LONGEST_LOG = 512 << 10
LONGEST_FILE = 4 << 20
UNSUPPORTED = "Device not supported"
"""compute-sanitizer prints this where it cannot work."""


class Skip(Exception):
    """A step has nothing to do, for the given reason."""


class Stopped(BaseException):
    """A signal ended the check."""


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds.

    ``command`` raises ``Skip`` if the step has nothing to do. Of the other steps, only ``beside``
    may run at the same time.
    """

    limit: int
    command: "Callable[[Check], list[str]]"
    beside: str = ""


@dataclass
class Running:
    """A step under way."""

    name: str
    process: "subprocess.Popen[bytes]"
    started: float
    limit: float


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step, as in ``summary.json``."""

    name: str
    verdict: str
    exit: int | None
    seconds: float
    limit: float
    reason: str


class Check:
    """A check in progress.

    Attributes:
        args: the options.
        work: folder for temporary files.
        results: folder for results.
        running: steps that have not ended.
        outcomes: of the steps that have ended, by name.
        stopped: the signal that ended the check.
    """

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work, self.results = args, work, work / "results"
        self.results.mkdir()
        found = shutil.which(os.environ.get("PYTHON", ""))
        self.python = str(Path(found).absolute()) if found else sys.executable
        self.device = "cpu" if args.cpu else "cuda"
        self.commit = args.commit or find_commit()
        self.running: list[Running] = []
        self.outcomes: dict[str, Outcome] = {}
        self.stopped: signal.Signals | None = None
        self.starting = False
        self.installed = False
        self.began = time.monotonic()
        self.packed = 0.0

    def run(self, names: Sequence[str]) -> None:
        """Run steps in their order."""
        for name in names:
            self.finish_all(beside=name)
            started = self.start(name)
            if started is not None and not STEPS[name].beside:
                self.finish(started)
        self.finish_all()

    def finish_all(self, beside: str = "") -> None:
        """Wait for the running steps, except one that may run at the same time as ``beside``."""
        for step in list(self.running):
            if not beside or STEPS[step.name].beside != beside:
                self.finish(step)

    def start(self, name: str) -> Running | None:
        """Start a step, unless it has nothing to do or there is no time left."""
        step = STEPS[name]
        limit = self.args.limit or min(step.limit, TOTAL - (time.monotonic() - self.began))
        try:
            if limit < LEAST and not self.args.limit:
                raise Skip("the steps before it left no time")
            command = step.command(self)
        except Skip as reason:
            self.end(Outcome(name, "skipped", None, 0.0, limit, str(reason)))
            return None
        self.starting = True  # a signal waits until the process is among those that run
        try:
            with self.log(name).open("wb") as log:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **self.environment()},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            self.running.append(Running(name, process, time.monotonic(), limit))
        except OSError as error:
            self.end(Outcome(name, "failed", None, 0.0, limit, str(error)))
            return None
        finally:
            self.starting = False
        if self.stopped is not None:
            raise Stopped
        return self.running[-1]

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The first signal ends the check. Later ones are ignored."""
        del frame
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        self.stopped = signal.Signals(number)
        if not self.starting:
            raise Stopped

    def finish(self, step: Running) -> None:
        """Wait for a step up to its limit, and record its outcome."""
        late = False
        while step.process.poll() is None:
            left = step.started + step.limit - time.monotonic()
            if left <= 0:
                late = True
                self.stop(step, GRACE)
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.process.wait(min(left, REFRESH))
            if time.monotonic() - self.packed > REFRESH:
                self.pack()
        kill(step.process)  # what it may have left behind
        status = step.process.returncode
        verdict = {0: "passed", SKIPPED: "skipped"}.get(status, "failed")
        reason = "" if status == 0 else self.last_line(step.name)
        if late:
            verdict, reason = "failed", f"ran past its limit of {step.limit:g} s"
        elif status < 0:
            reason = f"ended by {signal.Signals(-status).name}"
        elif status > 0 and UNSUPPORTED in self.text(step.name):
            verdict, reason = "skipped", "compute-sanitizer does not support this device or machine"
        seconds = time.monotonic() - step.started
        exit_status = None if verdict == "skipped" else status
        self.end(Outcome(step.name, verdict, exit_status, seconds, step.limit, reason))
        self.use_library(step.name, verdict, status)

    def end(self, outcome: Outcome) -> None:
        """Print and save the outcome of a step."""
        outcome = replace(outcome, seconds=round(outcome.seconds, 1), limit=round(outcome.limit, 1))
        self.outcomes[outcome.name] = outcome
        self.running = [step for step in self.running if step.name != outcome.name]
        print(
            f"{outcome.name:<16} {outcome.verdict:<8} {outcome.seconds:6.1f} s of "
            f"{outcome.limit:g}  {outcome.reason}",
            flush=True,
        )
        self.pack()

    def abandon(self, why: str) -> None:
        """End all running steps, for the reason ``why``."""
        for step in list(self.running):
            if step.process.poll() is not None:
                self.finish(step)
                continue
            self.stop(step, GRACE / 2)
            seconds = time.monotonic() - step.started
            status = step.process.returncode
            self.end(Outcome(step.name, "failed", status, seconds, step.limit, why))

    def stop(self, step: Running, grace: float) -> None:
        """Ask a step to end, so that it can write its results; then kill all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            step.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.process.wait(grace)
        kill(step.process)
        step.process.wait()

    def use_library(self, step: str, verdict: str, status: int) -> None:
        """Install the library after its build, and remove it if its kernels end processes."""
        built, place = self.work / "build" / "lib" / "blip3o_fast", ROOT / "blip3o_fast"
        names = ("_C.so", "_build_info.json")
        if step == "build" and verdict == "passed" and not self.args.cpu:
            try:
                for name in names:
                    draft = place / f"{name}.part"
                    shutil.copy(built / name, draft)
                    draft.replace(place / name)
                self.installed = True
            except OSError as error:
                print(f"the CUDA C++ kernels could not be installed: {error}", flush=True)
        if step == "kernels" and status == BROKE and self.installed:
            for name in reversed(names):
                (place / name).unlink(missing_ok=True)
            print("the CUDA C++ kernels are left out of the steps that follow", flush=True)

    def environment(self) -> dict[str, str]:
        """Variables of every step."""
        paths = [ROOT, ROOT / "kernels", self.work / "site", os.environ.get("PYTHONPATH", "")]
        # CMake may be installed beside this Python.
        programs = [Path(self.python).parent, os.environ.get("PATH", "")]
        found = {
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
            "PATH": os.pathsep.join(map(str, programs)),
            "PYTHONUNBUFFERED": "1",
            "BLIP3O_FAST_COMMIT": self.commit,
        }
        if self.args.cpu:
            found["CUDA_VISIBLE_DEVICES"] = ""
        return found

    def log(self, name: str) -> Path:
        """The file for the output of a step."""
        return self.results / f"{name}.log"

    def text(self, name: str) -> str:
        """The output of a step so far; of long output the end."""
        try:
            return read_end(self.log(name)).decode(errors="replace")
        except OSError as error:
            return str(error)

    def last_line(self, name: str) -> str:
        """The last line of a step's output."""
        lines = [line.strip() for line in self.text(name).splitlines()]
        return next((line[:300] for line in reversed(lines) if line), "no output")

    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json`` so far."""
        steps = [
            {**asdict(outcome), "log": self.log(outcome.name).name}
            for outcome in self.outcomes.values()
        ]
        return {
            "kind": KIND,
            "format": FORMAT,
            "mode": "cpu" if self.args.cpu else "gpu",
            "commit": self.commit or None,
            "environment": read_json(self.results / "environment.json"),
            "steps": steps,
            "failed": sum(step["verdict"] == "failed" for step in steps),
            "running": [step.name for step in self.running],
        }

    def pack(self) -> None:
        """Replace the archive. If that is impossible, the old one stays."""
        self.packed = time.monotonic()
        draft = self.args.out / f"{ARCHIVE}.part"
        try:
            with tarfile.open(draft, "w:gz") as archive:
                add(archive, "summary.json", (json.dumps(self.summary(), indent=1) + "\n").encode())
                for path in sorted(self.results.rglob("*")):
                    if path.suffix in (".json", ".png", ".log") and not path.is_dir():
                        content = read_result(path)
                        if content is not None:
                            add(archive, path.relative_to(self.results).as_posix(), content)
            draft.replace(self.args.out / ARCHIVE)
        except (OSError, tarfile.TarError) as error:
            print(f"{self.args.out / ARCHIVE}: not replaced: {error}", flush=True)
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to an archive."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), int(time.time())
    archive.addfile(info, io.BytesIO(content))


def read_result(path: Path) -> bytes | None:
    """The content of a result, or the end of a log. None if it is unreadable or too large."""
    try:
        if path.suffix == ".log":
            return read_end(path)
        return path.read_bytes() if path.stat().st_size <= LONGEST_FILE else None
    except OSError:
        return None


def read_end(path: Path) -> bytes:
    """The end of a log."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_LOG))
        return file.read()


def read_json(path: Path) -> Any:
    """The content of a file, None without it."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a step and every process that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def find_commit() -> str:
    """The commit of the checkout, or "" if it is a copy without history."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    top, _, commit = done.stdout.strip().partition("\n")
    return commit if top and Path(top).resolve() == ROOT else ""


def find_program(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, or in ``CUDA_HOME``."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(f"{home}/bin/{name}")


def describe(check: Check) -> list[str]:
    """The environment."""
    return script(check, "describe_machine", "environment")


def build(check: Check) -> list[str]:
    """CMake and nvcc, outside the tree."""
    if find_program("nvcc") is None:
        raise Skip("nvcc was not found")
    folder = check.work / "build"
    places = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    targets = os.environ.get("TORCH_CUDA_ARCH_LIST") or find_target()
    variables = ["BLIP3O_FAST_CUDA=1", f"TORCH_CUDA_ARCH_LIST={targets}"]
    return ["env", *variables, check.python, "setup.py", "build_ext", *places]


def find_target() -> str:
    """The compute capability to compile for: the GPU's, or without one that of an H100."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        printed = ""
    found = re.match(r"(\d+)\.\d+", printed)
    if found is None:
        return "9.0a"
    return found[0] + "a" * (int(found[1]) >= 9)


def smoke(check: Check) -> list[str]:
    """The checks that need no build."""
    if check.args.cpu:
        return script(check, "smoke", "smoke", "reference", "--ops", "swiglu", "rope")
    return script(check, "smoke", "smoke", "models", "triton")


def kernels(check: Check) -> list[str]:
    """The kernels that were built."""
    if check.args.cpu:
        raise Skip("the CUDA C++ kernels need a GPU")
    if not (ROOT / "blip3o_fast" / "_C.so").is_file():
        raise Skip("the CUDA C++ kernels were not built")
    return script(check, "smoke", "kernels", "cuda")


def bench(name: str, *groups: str) -> Callable[[Check], list[str]]:
    """Some groups of ``blip3o-fast bench``, into a folder of their own."""

    def command(check: Check) -> list[str]:
        folder = check.results / name
        words = ["--device", check.device, "--quick", "--output_dir", str(folder)]
        words += ["--groups", *(("loader",) if check.args.cpu else groups)]
        words += ["--seconds", "0.05"] if check.args.cpu else []
        words += [] if importlib.util.find_spec("matplotlib") else ["--no_plots"]
        return [check.python, "-m", "blip3o_fast", "bench", *words]

    return command


def profile(of: str, name: str) -> Callable[[Check], list[str]]:
    """The launches of one evaluation or training step."""

    def command(check: Check) -> list[str]:
        tiny = ["--preset", "tiny", "--batch", "1"] if check.args.cpu else []
        return script(check, "profile_launches", name, "--of", of, *tiny)

    return command


def long(check: Check) -> list[str]:
    """Many training steps."""
    tiny = ["--preset", "tiny", "--batch", "1", "--samples", "4", "--steps", "4"]
    return script(check, "long_training", "long", *(tiny if check.args.cpu else []))


def tests(check: Check) -> list[str]:
    """The GPU tests; with ``--cpu`` a small file of tests."""
    words = ["--processes", "12", "-m", "gpu and not slow"]
    if check.args.cpu:
        words = ["--processes", "2", "tests/test_axes.py"]
    if check.args.wheels is not None:
        words += ["--wheels", str(check.args.wheels), "--site", str(check.work / "site")]
    program = [check.python, "benchmarks/gpu_tests.py"]
    return [*program, "--json", str(check.results / "tests.json"), *words]


def sanitize(tool: str) -> Callable[[Check], list[str]]:
    """Our kernels in bf16 under compute-sanitizer."""

    def command(check: Check) -> list[str]:
        if check.args.cpu:
            raise Skip("compute-sanitizer watches a GPU")
        found = find_program("compute-sanitizer")
        if found is None:
            raise Skip("compute-sanitizer was not found")
        watched = [check.python, "benchmarks/every_op.py", "--dtype", "bf16"]
        # Without the caching allocator every tensor is an allocation, whose borders are checked.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        return [*uncached, found, "--tool", tool, "--error-exitcode", "9", *watched]

    return command


def script(check: Check, name: str, result: str, *words: str) -> list[str]:
    """A program of this folder that writes a record."""
    path = check.results / f"{result}.json"
    program = [check.python, f"benchmarks/{name}.py", *words]
    return [*program, "--device", check.device, "--json", str(path)]


STEPS = {
    "environment": Step(20, describe),
    "build": Step(60, build, beside="smoke"),
    "smoke": Step(60, smoke),
    "kernels": Step(25, kernels),
    "evaluation": Step(70, bench("evaluation", "evaluation", "generate")),
    "ops": Step(80, bench("ops", "ops", "attention", "block")),
    "training": Step(60, bench("training", "training", "loader")),
    "profile": Step(30, profile("evaluation", "profile")),
    "profile_training": Step(35, profile("training", "profile_training")),
    "tests": Step(150, tests),
    "memcheck": Step(120, sanitize("memcheck")),
    "racecheck": Step(120, sanitize("racecheck")),
    "long": Step(400, long),
}
BY_NAME = ("long",)
"""Steps that run only if ``--steps`` names them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps."""
    args = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(
        prefix="blip3o-fast-check-", ignore_cleanup_errors=True
    ) as name:
        check = Check(args, Path(name))
        for number in SIGNALS:
            signal.signal(number, check.receive)
        try:
            check.run(args.steps)
        except Stopped:
            pass
        finally:
            why = f"stopped by {check.stopped.name}" if check.stopped else "ended by an error"
            check.abandon(f"the check was {why}")
            check.pack()
        print(f"results: {args.out / ARCHIVE}", flush=True)
        if check.stopped is not None:
            return 128 + check.stopped
        return int(check.summary()["failed"] > 0)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; the folder is made."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for the results")
    add("--cpu", action="store_true", help="small budgets on a CPU: for testing this, no figures")
    add("--steps", help="only these, with commas between them")
    add("--limit", type=float, help="seconds of each step, instead of its own")
    add("--wheels", type=Path, help="folder of wheels of pytest, for a machine without it")
    add("--commit", default="", help="of a copy of the checkout without its history")
    args = parser.parse_args(arguments)
    chosen = [name for name in STEPS if name not in BY_NAME]
    args.steps = args.steps.split(",") if args.steps else chosen
    for name in args.steps:
        if name not in STEPS:
            parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {name}")
    if args.limit is not None and not args.limit > 0:
        parser.error(f"--limit: expected seconds, got {args.limit}")
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels: expected a folder, got {args.wheels}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"expected a folder for the results, got {args.out}: {error}")
    args.out = args.out.resolve()
    args.wheels = args.wheels and args.wheels.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
