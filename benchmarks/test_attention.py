"""Attention of one layer, forward and backward, by every backend that can run."""

from collections.abc import Callable

GROUP = "attention"


def test_attention(measure: Callable[[], None]) -> None:
    """One backend at one shape."""
    measure()
