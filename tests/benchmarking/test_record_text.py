"""Records as text."""

import pytest
from benchmarking.records import measurement, record

from blip3o_fast.benchmarking.record_text import render_group, render_record, seconds
from blip3o_fast.report.columns import align


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5, "2.5 s"),
        (0.0123456, "12.3 ms"),
        (1e-3, "1 ms"),
        (4.5678e-5, "45.7 us"),
        (1.234e-7, "0.12 us"),
    ],
)
def test_three_digits_and_a_unit(value, text):
    assert seconds(value) == text


def test_columns_are_aligned():
    rows = align([("", "who", "time"), ("a task", "x", "10 ms")])
    assert rows == ["        who   time", "a task  x    10 ms"]
    assert align([]) == []


def test_a_time_stands_beside_its_limit():
    head, row = render_group("evaluation", [measurement(spread=0.1)])[1:]
    assert head.split() == ["contender", "time", "+-", "limit", "of", "limit", "bound", "by"]
    assert row == "evaluation, base-b1, bf16  plan       2 ms  5%   1 ms       50%   compute"


def test_contenders_of_a_task_stand_together():
    _, _, first, second = render_group("evaluation", [measurement("a"), measurement("b")])
    assert first.startswith("evaluation, base-b1, bf16  a")
    assert second.split()[0] == "b"


def test_what_only_some_know_has_a_column_then():
    rows = [measurement("a", warm=1e-3, host=2e-5), measurement("b")]
    head, first, second = render_group("ops", rows)[1:]
    assert head.split()[-2:] == ["warm", "host"]
    assert first.split()[-4:] == ["1", "ms", "20", "us"]
    assert second.endswith("compute")


def test_a_prediction_stands_beside_the_measurement():
    rows = [measurement("triton", group="ops", predicted=0.4), measurement("cuda", group="ops")]
    lines = render_record(record(*rows, predictions="predicted for some GPU")).splitlines()
    start = lines.index("ops")
    assert " ".join(lines[start + 1].split()).endswith("of limit predicted off bound by")
    assert lines[start + 2].split()[-4:] == ["50%", "40%", "+25%", "compute"]
    assert lines[start + 3].split()[-2:] == ["50%", "compute"]
    assert lines[start + 4] == "predicted for some GPU"


def test_a_device_that_waited_for_the_host_is_said():
    texts = [render_group("ops", [measurement(queued=q)])[2] for q in (None, True, False)]
    assert ["(host-bound)" in text for text in texts] == [False, False, True]


def test_a_time_below_its_limit_is_a_fault_of_the_ceiling():
    _, _, slow, fast, note = render_group("ops", [measurement("a"), measurement("b", 5e-4)])
    assert "50%" in slow and "200%!" in fast
    assert note.startswith("! faster than the limit, whose ceiling was measured too low")


def test_a_whole_record():
    figures = [measurement(group=group) for group in ("ops", "block", "ops")]
    figures[2] = measurement(group="ops", name="rope")
    lines = render_record(record(*figures)).splitlines()
    assert lines[0] == "some GPU; load 0.5"
    assert lines[1] == (
        "measured ceilings: 3e+03 GB/s copy, 800 TFLOP/s bf16, 50 GB/s from the host"
    )
    assert lines.count("ops") == 1 and lines.count("block") == 1
    assert "peers present: triton 3.6.0" in lines
    assert "liger-kernel: absent: not installed" in lines
    assert "left out, training: not among the groups asked for" in lines
