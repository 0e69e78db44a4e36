"""Every fused op, forward and backward, by every implementation."""

from collections.abc import Callable

GROUP = "ops"


def test_op(measure: Callable[[], None]) -> None:
    """One implementation of one op at one shape, cold and warm."""
    measure()
