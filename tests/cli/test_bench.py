"""``blip3o-fast bench``: options, files, exit status."""

import json
import os
import re
import signal
import sys

import pytest
import torch
from benchmarking.records import measurement, record

from blip3o_fast.benchmarking import selection, suite
from blip3o_fast.benchmarking.cases import Case, Contender
from blip3o_fast.benchmarking.environment import device_name
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.cli.main import main


def bench(*words):
    return main(["bench", *map(str, words)])


def here(*measurements, **rest):
    return record(*measurements, device=device_name(torch.device("cpu")), kind="cpu", **rest)


@pytest.fixture
def result(monkeypatch):
    """What a run would find; its settings are kept."""
    asked = []

    def put(run):
        monkeypatch.setattr(suite, "run_suite", lambda settings, **_: asked.append(settings) or run)
        return asked

    return put


@pytest.fixture
def never(monkeypatch):
    def run(*_, **__):
        raise AssertionError("measured before the options were checked")

    monkeypatch.setattr(suite, "run_suite", run)


def refused(capsys, *words):
    status, captured = bench(*words), capsys.readouterr()
    assert status == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("blip3o-fast bench: error: ")
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--groups", "ops", "speed"], "groups: expected some of ops, attention, .*got 'speed'"),
        (["--seconds", "0"], r"seconds: expected more than 0, got 0\.0"),
        (["--seconds", "nan"], "seconds: expected a number, got nan"),
        (["--seconds", "inf"], "seconds: expected a number, got inf"),
        (["--published", "nowhere"], "published: expected a folder, found none at nowhere"),
        (["--compare", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_options_are_refused_in_one_line(never, capsys, words, message):
    assert re.search(message, refused(capsys, *words))


def test_no_gpu(never, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "device: expected one of the 0 CUDA devices" in refused(capsys, "--device", "cuda")


def test_a_folder_that_is_not_the_published_repository(never, capsys, tmp_path):
    assert "expected a checkout of the published" in refused(capsys, "--published", tmp_path)


def test_a_record_to_compare_with_is_read_first(never, capsys, tmp_path):
    file = tmp_path / "old.json"
    file.write_text("{}")
    assert "expected the kind" in refused(capsys, "--device", "cpu", "--compare", file)
    record(measurement(), device="H100").write(file)
    line = refused(capsys, "--device", "cpu", "--compare", file)
    assert "expected a record of this device" in line and "got one of H100" in line


def test_a_folder_that_cannot_be(never, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench("--output_dir", tmp_path / "file" / "bench") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_matplotlib(never, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--quick") == 1
    assert "expected matplotlib" in capsys.readouterr().err


def test_tables_record_and_pictures(result, capsys, tmp_path):
    asked = result(here(measurement()))
    words = ("--quick", "--groups", "loader", "ops", "ops", "--seconds", 0.5, "--device", "cpu")
    assert bench(*words, "--output_dir", tmp_path / "a" / "b") == 0
    (settings,) = asked
    assert settings.groups == ("ops", "loader"), "in the order of a run, each once"
    assert (settings.quick, settings.seconds, settings.published) == (True, 0.5, None)
    assert settings.device == torch.device("cpu")
    out = capsys.readouterr().out
    assert "evaluation, base-b1, bf16  plan" in out
    assert f"Record: {tmp_path / 'a' / 'b' / 'bench.json'}" in out
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()}
    assert set(files) == {"bench.json", "roofline.png", "evaluation.png"}
    assert all(data.startswith(b"\x89PNG") for name, data in files.items() if "png" in name)
    assert json.loads(files["bench.json"])["kind"] == "blip3o-fast benchmarks"


def test_no_plots(result, capsys, tmp_path):
    result(here(measurement()))
    assert bench("--no_plots", "--device", "cpu", "--output_dir", tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(("seconds", "status"), [(2e-3, 0), (4e-3, 1), (1e-3, 0)])
def test_a_regression_is_the_exit_status(result, capsys, tmp_path, seconds, status):
    here(measurement(seconds=2e-3)).write(tmp_path / "bench.json")
    result(here(measurement(seconds=seconds)))
    words = ("--no_plots", "--device", "cpu", "--output_dir", tmp_path)
    assert bench(*words, "--compare", tmp_path / "bench.json") == status
    assert ("REGRESSION" in capsys.readouterr().out) == bool(status)


def test_a_failure_is_the_exit_status_after_everything_is_written(result, capsys, tmp_path):
    result(here(measurement(), failures={"swiglu, base-b1, bf16: triton": "RuntimeError: no"}))
    assert bench("--device", "cpu", "--output_dir", tmp_path) == 1
    assert "FAILED, swiglu, base-b1, bf16: triton: RuntimeError: no" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        *("bench.json", "roofline.png", "evaluation.png")
    }


def test_a_run_that_measured_nothing_has_no_pictures(result, tmp_path):
    result(here(failures={"the run": "stopped by SIGTERM"}))
    assert bench("--device", "cpu", "--output_dir", tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_stopped_run_has_written_what_it_measured(monkeypatch, tmp_path, name):
    """And what ``bench.json`` says in the middle of a case is what came before it."""
    path = tmp_path / "bench.json"

    def cases(settings):
        made = op_cases(Shape("tiny", 1, 16), "fp32", settings.device, compiled=False)
        by_name = {case.task.name: case for case in made}
        first, second = by_name["swiglu"], by_name["adapter_mix"]
        yield "ops", lambda: iter((first, Case(second.task, (Contender("killer", kill),))))

    def kill():
        (row,) = json.loads(path.read_text())["measurements"]
        assert row["name"] == "swiglu"
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(selection, "cpu_sources", cases)
    words = ("--quick", "--seconds", 0.01, "--device", "cpu", "--no_plots")
    assert bench(*words, "--output_dir", tmp_path, "--groups", "ops") == 1
    content = json.loads(path.read_text())
    assert content["failures"] == {"the run": f"stopped by {name}"}
    assert len(content["measurements"]) == 1


def test_a_measurement(monkeypatch, capsys, tmp_path):
    """A run as a user has it, of one op at a small shape."""

    def sources(settings):
        shape = Shape("tiny", 1, 16)
        made = op_cases(shape, "fp32", settings.device, compiled=False)
        yield "ops", lambda: [case for case in made if case.task.name == "solver_update"]

    monkeypatch.setattr(selection, "cpu_sources", sources)
    words = ("--quick", "--seconds", 0.01, "--device", "cpu", "--output_dir", tmp_path)
    assert bench(*words, "--groups", "ops") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "ceilings of this device",
        "ops: solver_update, tiny-b1-n16, fp32",
    ]
    assert "solver_update, tiny-b1-n16, fp32  reference" in captured.out
    rows = json.loads((tmp_path / "bench.json").read_text())["measurements"]
    assert len(rows) == 2
    for row in rows:
        assert row["median"] > 0 and row["limit"] > 0 and row["bound"] == "memory"
