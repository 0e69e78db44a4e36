"""Measured launches: what is tried, what is kept, what is read back."""

import json

import pytest
import torch
from blip3o_kernels import launch, tuning

BUILT_IN = launch.RowLaunch(1024, 4, 8)
X = torch.zeros(2, 768)


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "cache" / "launches.json"
    tuning.enable(file)
    yield file
    tuning.disable()


def best(milliseconds, rows=100, name="norm", x=X):
    """The choice where ``milliseconds(launch)`` is the clock, and the launches that were timed."""
    timed = []

    def run(candidate):
        timed.append(candidate)
        return candidate

    chosen = tuning.best(
        name, x, rows, launch.candidates(BUILT_IN), run, lambda call: milliseconds(call())
    )
    return chosen, timed


def test_candidates_are_half_and_double():
    tried = launch.candidates(BUILT_IN)
    assert tried[0] == BUILT_IN and len(set(tried)) == 9
    assert {c.num_warps for c in tried} == {2, 4, 8} and {c.rows for c in tried} == {4, 8, 16}
    assert all(1 <= c.num_warps <= 16 for c in launch.candidates(launch.RowLaunch(256, 1, 1)))
    assert all(c.rows >= 1 for c in launch.candidates(launch.RowLaunch(256, 1, 1)))


def test_the_fastest_is_kept_and_not_measured_again(table):
    chosen, timed = best(lambda c: abs(c.num_warps - 8) + abs(c.rows - 4))
    assert chosen == launch.RowLaunch(1024, 8, 4) and len(timed) == 9
    again, timed = best(lambda c: 0.0)
    assert again == chosen and not timed
    tuning.disable()
    tuning.enable(table)
    again, timed = best(lambda c: 0.0)
    assert again == chosen and not timed


def test_one_entry_a_kernel_dtype_width_and_power_of_two_of_rows(table):
    for rows, fresh in ((100, True), (128, False), (65, False), (129, True), (64, True)):
        assert bool(best(lambda c: 0.0, rows)[1]) is fresh, rows
    assert best(lambda c: 0.0, name="other")[1]
    assert best(lambda c: 0.0, x=X.half())[1] and best(lambda c: 0.0, x=X[:, :64])[1]
    assert len(json.loads(table.read_text())) == 6


def test_off_means_the_built_in_table():
    tuning.disable()
    chosen, timed = best(lambda c: pytest.fail("measured"))
    assert chosen == BUILT_IN and not timed and not tuning.enabled()


def test_entry_of_another_version_is_measured_anew(table):
    best(lambda c: 0.0)
    key = next(iter(json.loads(table.read_text())))
    table.write_text(json.dumps({key: [2048, 32, 64]}))
    tuning.enable(table)
    chosen, timed = best(lambda c: float(c.rows))
    assert chosen.rows == 4 and timed
    assert json.loads(table.read_text())[key] == list(chosen)


@pytest.mark.parametrize("text", ["not json", "[1]", '{"norm": "fast"}', '{"norm": [1.5]}'])
def test_file_that_is_something_else(tmp_path, text):
    file = tmp_path / "launches.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"launches.json: expected a JSON table of launches"):
        tuning.enable(file)
    assert not tuning.enabled() and file.read_text() == text


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.default_path() == tmp_path / "blip3o_fast" / "launches.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.default_path().parts[-3:] == (".cache", "blip3o_fast", "launches.json")
