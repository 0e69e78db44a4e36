"""A whole optimizer step on a batch in memory."""

from collections.abc import Callable

GROUP = "training"


def test_training_step(measure: Callable[[], None]) -> None:
    """One way to run the trainer."""
    measure()
