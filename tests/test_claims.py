"""Units that processes share out: one holder at a time, and none that outlives its process."""

import os

import pytest

from blip3o_fast.claims import CLAIMS_FILE, Claims
from blip3o_fast.errors import OptionError

pytest.importorskip("fcntl", reason="needs the locks of fcntl")
PLAN = bytes(32)


def in_child(work):
    """What ``work`` returns in a process of its own, as a byte."""
    child = os.fork()
    if child == 0:
        status = 255
        try:
            status = int(work())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_unit_has_one_holder(tmp_path):
    def takes(unit):
        with Claims(tmp_path, PLAN) as other:
            return other.take(unit)

    with Claims(tmp_path, PLAN) as claims:
        assert claims.take(3)
        assert not in_child(lambda: takes(3))
        assert in_child(lambda: takes(4))
        claims.release(3)
        assert in_child(lambda: takes(3))


def test_a_unit_of_a_process_that_died_is_free(tmp_path):
    def dies():
        claims = Claims(tmp_path, PLAN)
        claims.take(0)
        os._exit(7)

    with Claims(tmp_path, PLAN) as claims:
        assert in_child(dies) == 7
        assert claims.take(0)


def test_processes_that_overlap_are_one_run(tmp_path):
    def same_run(name):
        with Claims(tmp_path, PLAN) as other:
            return other.run == name

    with Claims(tmp_path, PLAN) as claims:
        first = claims.run
        assert in_child(lambda: same_run(first))
    with Claims(tmp_path, PLAN) as claims:
        assert claims.run != first


def test_the_last_one_to_leave_knows(tmp_path):
    def leaves():
        with Claims(tmp_path, PLAN) as other:
            return other.is_last()

    with Claims(tmp_path, PLAN) as claims:
        assert not in_child(leaves)
        assert claims.is_last()
        claims.go_on()
        assert not in_child(leaves)
        assert claims.is_last()
        claims.remove()
    assert not (tmp_path / CLAIMS_FILE).exists()
    assert in_child(leaves)


def test_another_plan_is_refused_while_somebody_works(tmp_path):
    def joins():
        with pytest.raises(OptionError, match="expected the same images and settings"):
            Claims(tmp_path, b"x" * 32)
        return True

    with Claims(tmp_path, PLAN):
        assert in_child(joins)
    with Claims(tmp_path, b"x" * 32):
        pass


def test_what_killed_writers_left_is_removed_by_the_first(tmp_path):
    left = tmp_path / ".shard_lot00000_00000.safetensors.123.tmp"
    left.touch()
    with Claims(tmp_path, PLAN) as claims:
        assert not left.exists()
        left.touch()

        def joins():
            with Claims(tmp_path, PLAN):
                return left.exists()

        assert in_child(joins)
        assert claims.take(0)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(OptionError, match="expected a file system with locks, got 'No locks"):
        Claims(tmp_path, PLAN)
