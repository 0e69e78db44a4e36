"""A loader that does nothing but deliver batches."""

from collections.abc import Callable

GROUP = "loader"


def test_loader(measure: Callable[[], None]) -> None:
    """One number of threads."""
    measure()
