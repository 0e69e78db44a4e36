"""Records: there and back, and what is wrong with a file."""

import json

import pytest
from benchmarking.records import measurement, record

from blip3o_fast.benchmarking.record import read_record


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bench.json"


def changed(path, change):
    record(measurement()).write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_there_and_back(path):
    run = record(
        measurement("plan", host=1e-5, warm=2e-3, peak=3, queued=True, rotation=7, predicted=0.9),
        measurement("published", 0.1, ours=False),
        predictions="for a GPU",
    )
    run.write(path)
    assert read_record(path) == run
    assert sorted(path.parent.iterdir()) == [path]


def test_fraction_of_the_limit():
    assert measurement(seconds=4e-3).fraction == 0.25


def test_not_json(path):
    path.write_text("{")
    with pytest.raises(ValueError, match=r"bench\.json: expected JSON"):
        read_record(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "other"}'])
def test_another_kind_of_file(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"expected the kind 'blip3o-fast benchmarks'|JSON object"):
        read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "expected format 1, got 2"),
        (lambda c: c.pop("peers"), "record: missing peers"),
        (lambda c: c.update(speed=1), "unknown record key 'speed'"),
        (lambda c: c["measurements"][0].pop("limit"), "measurements: missing limit"),
        (lambda c: c["measurements"][0].update(x=1), "unknown measurements key 'x'"),
        (lambda c: c["measurements"][0].update(median="1 s"), "median: expected a number, got"),
        (lambda c: c["measurements"].append(c["measurements"][0]), "each measurement once"),
    ],
    ids=["format", "no peers", "extra field", "no limit", "extra figure", "text", "twice"],
)
def test_a_record_of_another_shape(path, change, message):
    with pytest.raises(ValueError, match=rf"bench\.json: {message}|bench\.json: .*{message}"):
        read_record(changed(path, change))


def test_no_file(path):
    with pytest.raises(FileNotFoundError):
        read_record(path)
