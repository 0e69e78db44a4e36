"""Every contender at every task of ``blip3o-fast bench``; ``conftest.py`` lists and times them."""

from collections.abc import Callable


def test_contender(measure: Callable[[], None]) -> None:
    """One contender at one task, cold and warm."""
    measure()
