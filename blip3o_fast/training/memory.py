"""Work on a batch in pieces that fit in device memory."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Pieces:
    """How many rows to process at once; halved whenever that turns out to be too many.

    Args:
        limit: rows to begin with.
        retry: off turns the first shortage into an error, for work that other processes share.
    """

    def __init__(self, limit: int, *, retry: bool = True) -> None:
        self.limit = limit
        self.retry = retry

    def slices(self, rows: int) -> list[slice]:
        """``rows`` rows as nearly equal slices of at most ``limit``."""
        count = max(1, -(-rows // self.limit))
        return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]

    def run(
        self, rows: int, work: Callable[[slice, bool], Result], reset: Callable[[], None]
    ) -> list[Result]:
        """Call ``work(slice, last)`` on every slice in turn.

        Args:
            rows: of the batch.
            work: may raise ``torch.OutOfMemoryError``.
            reset: undoes what the finished slices did, before all of them are done again.

        Raises:
            MemoryError: if a single row does not fit.
        """
        while True:
            slices = self.slices(rows)
            try:
                return [work(piece, piece is slices[-1]) for piece in slices]
            except torch.OutOfMemoryError as error:
                if not self.retry or self.limit == 1:
                    raise MemoryError(
                        f"out of device memory with {self.limit} samples at once; "
                        + ("use a smaller model" if self.limit == 1 else "lower batch_size or ")
                        + ("" if self.limit == 1 else "raise gradient_accumulation_steps")
                    ) from error
            # Only here, after the handler, does the traceback let go of the failed slice's tensors.
            reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.limit = (min(self.limit, rows) + 1) // 2
