"""A whole translation by Heun's method."""

from collections.abc import Callable

GROUP = "generate"


def test_generate(measure: Callable[[], None]) -> None:
    """One way to run the plan at one batch."""
    measure()
