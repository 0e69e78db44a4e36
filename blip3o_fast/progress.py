"""How far a long job is: a bar on a terminal, plain lines on standard error anywhere else."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

from blip3o_fast.quantities import duration

LINE_EVERY = 10.0
"""Seconds between lines."""

Item = TypeVar("Item")


class Progress:
    """Counts what is done of a job; use it as a context manager.

    A line tells what is done, the rate and the time left, at most every ten seconds and at the end.

    Args:
        label: names the job.
        total: units of the whole job; None: unknown. May be set later.
        unit: in the singular.
        done: units that were done before.
        enabled: off shows nothing.
        lines: off leaves the lines to the caller, and ``say``.
        leave: whether the bar stays when the job is done.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "sample",
        *,
        done: int = 0,
        enabled: bool = True,
        lines: bool = True,
        leave: bool = True,
    ) -> None:
        self.label, self.unit, self.enabled = label, unit, enabled
        self.done = self.before = self.last = done
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, initial=done, desc=label, unit=unit, leave=leave, dynamic_ncols=True
            )
        self.lines = enabled and lines and self.bar is None
        self.total = total
        self.started = self.told = time.monotonic()

    @property
    def total(self) -> int | None:
        """Units of the whole job."""
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        self._total = total
        if self.bar is not None:
            self.bar.total = total

    def update(self, count: int = 1) -> None:
        """So many more units are done; fewer, if they have to be done again."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.lines and time.monotonic() - self.told >= LINE_EVERY:
            self.tell()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each a unit that is done when the next is asked for."""
        for item in items:
            yield item
            self.update()

    def say(self, line: str) -> None:
        """Show a line, without breaking the bar."""
        if self.enabled:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def tell(self) -> None:
        """A line with what is done."""
        self.told, self.last = time.monotonic(), self.done
        seconds = self.told - self.started
        rate = (self.done - self.before) / max(seconds, 1e-9)
        of = "" if self.total is None else f"/{self.total}"
        plural = "" if (self.total or self.done) == 1 else "s"
        line = f"{self.label}: {self.done}{of} {self.unit}{plural}"
        line += f", {rate:.3g} {self.unit}s/s, {duration(seconds)} so far"
        if self.total is not None and self.done < self.total and rate > 0:
            line += f", {duration((self.total - self.done) / rate)} left"
        self.say(line)

    def close(self) -> None:
        """Leave the bar as it stands, or say how far the job came."""
        if self.bar is not None:
            self.bar.close()
        elif self.lines and self.done != self.last:
            self.tell()
        self.lines = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.lines = False  # the error says what is to be said
        self.close()
