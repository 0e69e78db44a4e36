"""One transformer block, its modulations computed from the time."""

from collections.abc import Callable

GROUP = "block"


def test_block(measure: Callable[[], None]) -> None:
    """The ops of one implementation at one shape."""
    measure()
