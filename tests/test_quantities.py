"""Numbers with their units."""

import pytest

from blip3o_fast.quantities import count, duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (185, "3 min 5 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (1023 << 20, "0.999 GiB"), (9 << 40, "9 TiB")],
)
def test_sizes(number, text):
    assert size(number) == text


def test_counts():
    assert [count(n, "photo") for n in (0, 1, 1200)] == ["0 photos", "1 photo", "1,200 photos"]
