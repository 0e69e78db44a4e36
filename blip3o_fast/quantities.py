"""Numbers with their units, as people are shown them."""

import math


def count(number: int, noun: str) -> str:
    """``1 photo``, ``1,200 photos``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def three_digits(number: float) -> str:
    """``70.8``, ``156``, ``18,300``."""
    if round(number) >= 1000:
        step = 10 ** (int(math.log10(round(number))) - 2)
        return f"{round(number / step) * step:,}"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Time with three digits: ``52 us``, ``4.2 s``, ``3.08 min``, ``2.5 h``."""
    for unit, scale in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{three_digits(seconds / scale)} {unit}"
    return "0 s"


def size(number: float) -> str:
    """Bytes with three digits: ``512 B``, ``1.5 MiB``, ``3.21 GiB``."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1000:
            break
        number, unit = number / 1024, larger
    return f"{three_digits(number)} {unit}"
