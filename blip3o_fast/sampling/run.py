"""Micro-batches under way, and the walk that carries all of a batch from noise to data."""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from blip3o_fast.flow import Callback
from blip3o_fast.sampling.conditioning import Context
from blip3o_fast.sampling.graph import CapturedStep
from blip3o_fast.sampling.stepper import Stepper, StepTable


class Run(Protocol):
    """A micro-batch under way."""

    @property
    def state(self) -> Tensor:
        """The present state ``[b, N, C]``; the next step may overwrite it."""
        ...

    def step(self, index: int) -> None:
        """Take step ``index``; steps are taken in order from 0."""
        ...


class EagerRun:
    """Every step launches its kernels."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper

    @property
    def state(self) -> Tensor:
        """The stepper's own buffer."""
        return self.stepper.state

    def step(self, index: int) -> None:
        """The stepper's counter says which step it is."""
        del index
        self.stepper.advance()


class GraphRun:
    """Every step replays a captured one.

    Args:
        captured: of a bucket that holds the micro-batch.
        table: of the grid.
        state: noise ``[b, N, C]``, overwritten.
        context: of the micro-batch.
        shared: whether others replay ``captured`` between two steps of this run; the graph's
            buffers are then copied in and out around every step.
    """

    def __init__(
        self,
        captured: CapturedStep,
        table: StepTable,
        state: Tensor,
        context: Context,
        *,
        shared: bool,
    ) -> None:
        self.captured, self.table, self.shared = captured, table, shared
        self.kept, self.context = state, context
        slopes = state.new_zeros(context.keys_values.shape[0], *state.shape[1:])
        self.past = slopes if captured.stepper.past is not None else None

    @property
    def state(self) -> Tensor:
        """This run's copy if the graph is shared, the graph's buffer otherwise."""
        return self.kept if self.shared else self.captured.stepper.state[: self.kept.shape[0]]

    def step(self, index: int) -> None:
        """Load what is needed, replay, and keep what others would overwrite."""
        if index == 0 or self.shared:
            self.captured.load(self.kept, self.context, self.past)
        self.captured.select(self.table, index)
        self.captured.replay()
        if self.shared:
            self.captured.unload(self.kept, self.past)


Start = Callable[[slice, bool], Run]
"""``(samples, shared) -> run``: prepare the micro-batch of those samples."""


def walk(
    start: Start,
    batch: int,
    steps: int,
    out: Tensor,
    *,
    limit: int,
    release: Callable[[], None],
    progress: bool = False,
    callback: Callback | None = None,
) -> int:
    """Carry ``batch`` samples through ``steps`` steps into ``out``; returns the limit that fitted.

    One micro-batch of at most ``limit`` samples after another; with a callback, which must see the
    whole batch after every step, all of them in step. When memory runs out, the limit is halved
    and what was under way begins again from its noise; steps reported already are not repeated.

    Raises:
        torch.OutOfMemoryError: if a single sample does not fit.
    """
    done = reported = 0
    with tqdm(desc="sampling", unit="step", disable=not progress) as bar:
        while done < batch:
            parts = split(done, batch, limit)
            group = parts if callback is not None else parts[:1]
            bar.total = bar.n + steps * (1 if callback is not None else len(parts))
            before = bar.n
            try:
                runs = [start(part, len(group) > 1) for part in group]
                for index in range(steps):
                    for run in runs:
                        run.step(index)
                    bar.update()
                    if callback is not None and index >= reported:
                        callback(index, torch.cat([run.state for run in runs]))
                        reported = index + 1
                for part, run in zip(group, runs, strict=True):
                    out[part] = run.state
                done = group[-1].stop
                continue
            except torch.OutOfMemoryError:
                if limit == 1:
                    raise torch.OutOfMemoryError(
                        "generate: out of memory on a micro-batch of one sample; free memory or "
                        "use a narrower dtype"
                    ) from None
            # Outside the handler, so that the traceback no longer holds the failed tensors.
            runs = []
            limit = (min(limit, max(p.stop - p.start for p in group)) + 1) // 2
            bar.update(before - bar.n)
            release()
    return limit


def split(first: int, last: int, limit: int) -> list[slice]:
    """Even parts of ``first .. last``, as few as ``limit`` samples a part allow."""
    count = -(-(last - first) // limit)
    edges = [first + (last - first) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
