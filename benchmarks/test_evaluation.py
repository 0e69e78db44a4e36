"""One evaluation of the velocity: hoisted and not, ours, compiled, published."""

from collections.abc import Callable

GROUP = "evaluation"


def test_evaluation(measure: Callable[[], None]) -> None:
    """One contender at one batch."""
    measure()
