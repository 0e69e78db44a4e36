"""``benchmarks/gpu_check.sh`` without a GPU: what it survives, what it leaves, what it reports.

Rehearsed in a copy of the checkout that has no history, with a Python and a compute-sanitizer that
do nothing but what a test tells them.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import pytest

ROOT = Path(__file__).parents[2]
STEPS = [name for name in gpu_check.STEPS if name not in gpu_check.BY_NAME]
WORDS = {
    "environment": "*describe_machine*",
    "build": "*setup.py*",
    "smoke": "*smoke.py*triton*",
    "kernels": "*smoke.py*cuda*kernels.json*",
    "evaluation": "*bench*generate*",
    "ops": "*bench*attention*",
    "training": "*bench*loader*",
    "profile": "*profile_launches*evaluation*",
    "profile_training": "*profile_launches*training*",
    "tests": "*gpu_tests*",
    "memcheck": "*memcheck*",
    "racecheck": "*racecheck*",
}
"""By what each step is told from the others."""
BUILD = 'mkdir -p "$4/blip3o_fast"; touch "$4/blip3o_fast/_C.so" "$4/blip3o_fast/_build_info.json"'


class Rehearsal:
    """A copy of the checkout, and programs that act as told."""

    def __init__(self, folder):
        self.folder, self.tree, self.out = folder, folder / "tree", folder / "out"
        self.bin, self.temporary = folder / "bin", folder / "temporary"
        self.temporary.mkdir()
        shutil.copytree(
            ROOT / "benchmarks", self.tree / "benchmarks", ignore=shutil.ignore_patterns("results")
        )
        (self.tree / "blip3o_fast").mkdir()
        self.bin.mkdir()
        self.library = self.tree / "blip3o_fast" / "_C.so"
        self.program("nvcc", "exit 0")
        self.program("compute-sanitizer", f'exec "{self.bin}/python" "compute-sanitizer $*"')
        self.acts()

    def program(self, name, body):
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def acts(self, **by_step):
        """What the Python does for some steps; every other ends well, and the check itself runs."""
        by_step.setdefault("build", BUILD)
        cases = [f'*gpu_check.py*) exec {sys.executable} "$@" ;;']
        cases += [f"{WORDS[name]}) {act} ;;" for name, act in by_step.items()]
        self.program("python", 'case "$*" in\n' + "\n".join(cases) + "\nesac")

    def environment(self, path=None):
        return {
            **{k: v for k, v in os.environ.items() if k != "BLIP3O_FAST_COMMIT"},
            "PYTHON": str(self.bin / "python"),
            "PATH": path or f"{self.bin}:{os.environ['PATH']}",
            "CUDA_HOME": "/nowhere",
            "TMPDIR": str(self.temporary),
        }

    def start(self, *arguments, path=None, **options):
        command = [self.tree / "benchmarks" / "gpu_check.sh", self.out, *map(str, arguments)]
        return subprocess.Popen(
            command,
            env=self.environment(path),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, *arguments, **options):
        with self.start(*arguments, **options) as process:
            said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def results(self):
        """The files of the archive, which is all that lies in OUT."""
        assert [path.name for path in self.out.iterdir()] == [gpu_check.ARCHIVE]
        with tarfile.open(self.out / gpu_check.ARCHIVE) as archive:
            return {
                member.name: archive.extractfile(member).read() for member in archive.getmembers()
            }

    def steps(self):
        content = json.loads(self.results()["summary.json"])
        return {step["name"]: step for step in content["steps"]}


@pytest.fixture
def rehearsal(tmp_path):
    return Rehearsal(tmp_path)


def wait_for(path):
    for _ in range(600):
        if path.exists() and path.read_text().strip():
            return path.read_text().strip()
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def is_running(pid):
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_step_runs_in_its_order_and_is_told_the_commit(rehearsal):
    tell = 'echo "$BLIP3O_FAST_COMMIT"; pwd'
    rehearsal.acts(**{**dict.fromkeys(STEPS, tell), "build": f"{BUILD}; {tell}"})
    status, said = rehearsal.run("--commit", "cafe")
    assert status == 0, said
    steps = rehearsal.steps()
    # The build runs beside the smoke test and ends after it.
    assert list(steps) == ["environment", "smoke", "build", *STEPS[3:]]
    assert all(step["verdict"] == "passed" for step in steps.values())
    results = rehearsal.results()
    for name in STEPS:
        assert results[f"{name}.log"].decode() == f"cafe\n{rehearsal.tree}\n"
    assert json.loads(results["summary.json"])["commit"] == "cafe"


def test_without_history_and_commit_nothing_is_made_up(rehearsal):
    """Least of all the commit of a clone in which the copy lies."""
    git = [
        "git",
        "-C",
        str(rehearsal.folder),
        "-c",
        "user.name=n",
        "-c",
        "user.email=e@example.org",
    ]
    for words in (["init"], ["commit", "--allow-empty", "-m", "another project"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    rehearsal.acts(environment='echo "<$BLIP3O_FAST_COMMIT>"')
    rehearsal.run("--steps", "environment")
    assert rehearsal.results()["environment.log"] == b"<>\n"
    assert json.loads(rehearsal.results()["summary.json"])["commit"] is None


HOW = {
    "fails": ("echo kernel is wrong; exit 3", "kernel is wrong"),
    "is killed": ("kill -KILL $$", "ended by SIGKILL"),
    "is terminated": ("kill -TERM $$", "ended by SIGTERM"),
    "hangs": ("exec sleep 60", "ran past its limit of 1 s"),
    "hangs and will not end": ("trap '' INT TERM; sleep 60 & wait", "ran past its limit of 1 s"),
}


@pytest.mark.parametrize("how", HOW)
def test_a_step_that_fails_costs_only_itself(rehearsal, how):
    act, reason = HOW[how]
    rehearsal.acts(profile=f"echo $$ > {rehearsal.folder}/pid; {act}")
    status, said = rehearsal.run("--limit", 1, "--steps", "ops,profile,memcheck")
    assert status == 1, said
    steps = rehearsal.steps()
    assert [steps[name]["verdict"] for name in ("ops", "profile", "memcheck")] == [
        *("passed", "failed", "passed")
    ]
    assert steps["profile"]["reason"] == reason
    assert steps["profile"]["exit"] == (3 if how == "fails" else steps["profile"]["exit"])
    assert "profile" in said and "failed" in said
    assert not is_running(int((rehearsal.folder / "pid").read_text()))


@pytest.mark.parametrize("name", STEPS)
def test_a_signal_in_the_middle_of_a_step_keeps_all_before_it_and_what_it_knew(rehearsal, name):
    mark = rehearsal.folder / "pid"
    build = f"{BUILD}; " if name == "build" else ""
    rehearsal.acts(**{name: f"{build}echo in the middle; echo $$ > {mark}; exec sleep 60"})
    with rehearsal.start() as process:
        pid = int(wait_for(mark))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    steps = rehearsal.steps()
    assert steps[name]["verdict"] == "failed"
    assert steps[name]["reason"] == "the check was stopped by SIGTERM"
    assert rehearsal.results()[f"{name}.log"] == b"in the middle\n"
    for before in STEPS[: STEPS.index(name)]:
        if gpu_check.STEPS[before].beside != name:  # which need not have ended
            assert steps[before]["verdict"] == "passed"
    assert not set(STEPS[STEPS.index(name) + 2 :]) & set(steps)
    assert not is_running(pid)


def test_a_check_that_is_killed_leaves_what_the_steps_before_found(rehearsal):
    mark = rehearsal.folder / "pid"
    rehearsal.acts(ops=f"echo $$ > {mark}; exec sleep 60")
    with rehearsal.start("--steps", "smoke,evaluation,ops") as process:
        pid = int(wait_for(mark))
        process.kill()
        process.communicate()
    os.kill(pid, signal.SIGKILL)
    content = json.loads(rehearsal.results()["summary.json"])
    assert [step["name"] for step in content["steps"]] == ["smoke", "evaluation"]


def test_a_record_comes_back_while_its_step_runs(rehearsal):
    """The archive is refreshed, so that a kill loses seconds and not a step."""
    script = rehearsal.tree / "benchmarks" / "gpu_check.py"
    script.write_text(script.read_text().replace("REFRESH = 15", "REFRESH = 0.3"))
    mark = rehearsal.folder / "pid"
    rehearsal.acts(tests=f'echo "{{}}" > "$3"; echo $$ > {mark}; exec sleep 60')
    with rehearsal.start("--steps", "tests") as process:
        pid = int(wait_for(mark))
        archive = rehearsal.out / gpu_check.ARCHIVE
        while not archive.exists():
            time.sleep(0.05)
        process.kill()
        process.communicate()
    os.kill(pid, signal.SIGKILL)
    results = rehearsal.results()
    assert results["tests.json"] == b"{}\n"
    assert json.loads(results["summary.json"])["running"] == ["tests"]


def noise(kilobytes):
    return f"head -c {kilobytes}k /dev/urandom"


def test_a_full_disk_leaves_the_last_archive_that_fitted(rehearsal):
    """No file may grow beyond 40 KB here: the archive with a third log of noise would."""
    rehearsal.acts(**dict.fromkeys(("smoke", "evaluation", "ops", "training"), noise(16)))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, 40 << 10))  # noqa: E731
    status, said = rehearsal.run("--steps", "smoke,evaluation,ops,training", preexec_fn=limit)
    assert "not replaced" in said and status == 0
    assert list(rehearsal.steps()) == ["smoke", "evaluation"]
    assert len(rehearsal.results()["evaluation.log"]) == 16 << 10
    assert len(re.findall("passed", said)) == 4, "the terminal still shows all"


@pytest.mark.parametrize("full", ["out", "work"])
def test_a_full_file_system(rehearsal, full):
    """Of the results, or of what the steps write."""
    small = rehearsal.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        names = ("smoke", "evaluation", "ops")
        acts = dict.fromkeys(names, f"{noise(40)}; echo; echo done")
        rehearsal.acts(**acts)
        if full == "out":
            rehearsal.out = small
        else:
            rehearsal.temporary = small
        status, said = rehearsal.run("--steps", ",".join(names))
        steps, results = rehearsal.steps(), rehearsal.results()
    finally:
        subprocess.run(["umount", str(small)], check=True)
    if full == "out":
        assert status == 0 and "not replaced" in said
        assert list(steps) == ["smoke"], "the archive takes its space twice while it is replaced"
    else:
        assert status == 1 and list(steps) == list(names)
        assert steps["ops"]["verdict"] == "failed"
    assert results["smoke.log"].endswith(b"done\n")


def test_without_nvcc_there_is_no_build_and_the_rest_runs(rehearsal):
    (rehearsal.bin / "nvcc").unlink()
    path = f"{rehearsal.bin}:/usr/bin:/bin"
    status, said = rehearsal.run("--steps", "build,smoke,kernels,tests", path=path)
    assert status == 0, said
    steps = rehearsal.steps()
    assert (steps["build"]["verdict"], steps["build"]["reason"]) == (
        "skipped",
        "nvcc was not found",
    )
    assert steps["kernels"]["reason"] == "the CUDA C++ kernels were not built"
    assert steps["smoke"]["verdict"] == steps["tests"]["verdict"] == "passed"


def test_the_library_is_in_place_from_the_step_after_the_smoke_test_on(rehearsal):
    there = f"test -e {rehearsal.library}"
    rehearsal.acts(smoke=f"sleep 1; ! {there}", kernels=there, tests=there)
    status, said = rehearsal.run("--steps", "build,smoke,kernels,tests")
    assert status == 0, said
    assert not any("_C" in name for name in rehearsal.results()), "no build products come back"


def test_a_kernel_that_ends_its_process_is_left_out_of_what_follows(rehearsal):
    gone = f"! test -e {rehearsal.library}"
    rehearsal.acts(kernels=f"exit {gpu_check.BROKE}", evaluation=gone, tests=gone)
    status, said = rehearsal.run("--steps", "build,kernels,evaluation,tests")
    assert status == 1 and "left out of the steps that follow" in said
    verdicts = {name: step["verdict"] for name, step in rehearsal.steps().items()}
    assert verdicts == {
        **{"build": "passed", "kernels": "failed"},
        **{"evaluation": "passed", "tests": "passed"},
    }


def test_a_build_that_fails_leaves_what_was_there(rehearsal):
    rehearsal.library.write_text("older")
    rehearsal.acts(build="echo no compiler; exit 1", kernels=f"exit {gpu_check.BROKE}")
    rehearsal.run("--steps", "build,kernels")
    assert rehearsal.library.read_text() == "older"
    assert rehearsal.steps()["build"]["reason"] == "no compiler"


def test_skipped_steps_are_not_failures_and_say_why(rehearsal):
    rehearsal.acts(tests="echo pytest is not installed; exit 77", racecheck="exit 0")
    rehearsal.program("compute-sanitizer", "echo Device not supported; exit 1")
    status, said = rehearsal.run("--steps", "tests,memcheck")
    assert status == 0, said
    steps = rehearsal.steps()
    assert all(step["verdict"] == "skipped" and step["exit"] is None for step in steps.values())
    assert steps["tests"]["reason"] == "pytest is not installed"
    assert "does not support this device" in steps["memcheck"]["reason"]
    status, said = rehearsal.run("--cpu", "--steps", "kernels,memcheck,racecheck")
    assert status == 0 and said.count("watches a GPU") == 2
    assert json.loads(rehearsal.results()["summary.json"])["mode"] == "cpu"


def test_the_end_of_a_long_log_comes_back(rehearsal):
    rehearsal.acts(ops="yes 0123456789abcde | head -c 3000000; echo the end")
    rehearsal.run("--steps", "ops")
    log = rehearsal.results()["ops.log"]
    assert len(log) == gpu_check.LONGEST_LOG and log.endswith(b"the end\n")


def test_the_steps_fit_a_call_of_ten_minutes():
    def limit(*names):
        return sum(gpu_check.STEPS[name].limit for name in names)

    sanitizer = ("memcheck", "racecheck")
    rest = [name for name in STEPS if name not in sanitizer and not gpu_check.STEPS[name].beside]
    assert limit(*rest) + 45 <= gpu_check.TOTAL, "some time is left for the sanitizer at worst"
    assert gpu_check.TOTAL + 2 * gpu_check.GRACE < 600
    assert STEPS[-2:] == list(sanitizer), "which gets what the others leave"


@pytest.fixture
def check(tmp_path):
    args = argparse.Namespace(cpu=True, limit=None, wheels=None, commit="", out=tmp_path / "out")
    args.out.mkdir()
    (tmp_path / "work").mkdir()
    return gpu_check.Check(args, tmp_path / "work")


def test_a_step_gets_no_more_than_the_steps_before_left(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "TOTAL", 3)
    monkeypatch.setattr(gpu_check, "LEAST", 1)
    sleep = gpu_check.Step(60, lambda check: ["sleep", "60"])
    monkeypatch.setattr(gpu_check, "STEPS", {"first": sleep, "second": sleep})
    started = time.monotonic()
    check.run(["first", "second"])
    assert time.monotonic() - started < 30
    first, second = check.outcomes.values()
    assert first.verdict == "failed" and first.limit == pytest.approx(3, abs=0.5)
    assert (second.verdict, second.reason) == ("skipped", "the steps before it left no time")


@pytest.mark.parametrize(
    "said, target", [("9.0", "9.0a"), ("8.9", "8.9"), ("10.0", "10.0a"), ("no devices", "9.0a")]
)
def test_the_build_is_for_the_gpu_that_is_here(tmp_path, monkeypatch, said, target):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_check.find_target() == target


def test_wheels_and_their_place_are_handed_to_the_tests(rehearsal):
    wheels = rehearsal.folder / "wheels"
    wheels.mkdir()
    rehearsal.acts(tests='echo "$*"; echo "$PYTHONPATH"')
    rehearsal.run("--steps", "tests", "--wheels", wheels)
    said, path = rehearsal.results()["tests.log"].decode().splitlines()
    site = re.search(r"--site (\S+)", said)[1]
    assert f"--wheels {wheels}" in said and "-m gpu and not slow" in said
    assert path.split(":")[:3] == [*(str(rehearsal.tree), str(rehearsal.tree / "kernels"), site)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "required: OUT"),
        (("out", "--what"), "--what"),
        (("out", "--steps", "benhc"), "got benhc"),
        (("out", "--limit", "0"), "--limit: expected seconds"),
        (("out", "--limit"), "expected one argument"),
        (("out", "--wheels", "/no/such"), "--wheels: expected a folder"),
    ],
)
def test_bad_arguments(arguments, said, tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_runs_on_a_cpu_from_a_plain_copy(tmp_path):
    """Not installed, without history; the commit that is named reaches every record."""
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "results", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    names = [name for name in STEPS if name != "build"]
    done = subprocess.run(
        [
            *(tmp_path / "tree" / "benchmarks" / "gpu_check.sh", "out", "--cpu"),
            *("--commit", "cafe", "--limit", "250", "--steps", ",".join(names)),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout
    with tarfile.open(tmp_path / "out" / gpu_check.ARCHIVE) as archive:
        archive.extractall(tmp_path / "results", filter="data")
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    verdicts = {step["name"]: step["verdict"] for step in summary["steps"]}
    skipped = {"kernels", "memcheck", "racecheck"}
    assert verdicts == {n: "skipped" if n in skipped else "passed" for n in names}
    records = sorted((tmp_path / "results").rglob("*.json"))
    assert {str(path.relative_to(tmp_path / "results")) for path in records} == {
        *("summary.json", "environment.json", "smoke.json", "tests.json"),
        *("evaluation/bench.json", "ops/bench.json", "training/bench.json"),
        *("profile.json", "profile_training.json"),
    }
    for path in records:
        content = json.loads(path.read_text())
        assert content.get("commit", (content.get("environment") or {}).get("commit")) == "cafe"
