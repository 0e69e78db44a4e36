"""Numbers with their units."""

import pytest

from blip3o_fast.quantities import count, duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (52.4e-6, "52.4 us"),
        (0.0571, "57.1 ms"),
        (4.2, "4.2 s"),
        (185, "3.08 min"),
        (3599.6, "60 min"),
        (7500, "2.08 h"),
        (5e6, "1,390 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999.6, "1,000 B"),
        (1536, "1.5 KiB"),
        (1023 << 20, "0.999 GiB"),
        (9 << 40, "9 TiB"),
    ],
)
def test_sizes(number, text):
    assert size(number) == text


def test_counts():
    assert [count(n, "photo") for n in (0, 1, 1200)] == ["0 photos", "1 photo", "1,200 photos"]
