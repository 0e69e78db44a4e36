"""Work on a batch in pieces that fit in device memory."""

from collections.abc import Callable
from itertools import pairwise
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
            slices = even_slices(0, rows, self.limit)
            try:
                return [work(piece, piece is slices[-1]) for piece in slices]
            except torch.OutOfMemoryError as error:
                if not self.retry or self.limit == 1:
                    remedy = (
                        "use a smaller model"
                        if self.limit == 1
                        else "lower batch_size or raise gradient_accumulation_steps"
                    )
                    raise MemoryError(
                        f"out of device memory with {self.limit} samples at once; {remedy}"
                    ) from error
            # Only here, after the handler, does the traceback let go of the failed slice's tensors.
            reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.limit = (min(self.limit, rows) + 1) // 2


def even_slices(start: int, stop: int, limit: int) -> list[slice]:
    """``start`` to ``stop`` as nearly equal slices of at most ``limit``, as few as that allows."""
    count = max(1, -(-(stop - start) // limit))
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
