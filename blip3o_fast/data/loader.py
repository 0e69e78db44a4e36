"""Batches of a shuffled data set, read ahead.

The order of batches is that of ``blip3o_fast.data.order`` for any number of threads. The position
is that of the next batch that the consumer gets, however far the threads have read ahead.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from blip3o_fast.data.dataset import Batch, EmbeddingDataset
from blip3o_fast.data.order import Position, epoch_order, rank_share, steps_per_epoch
from blip3o_fast.data.readahead import BatchReader, Ready

_one_order_at_a_time = threading.Lock()  # sorting tens of millions takes seconds and much memory


class Loader:
    """An endless iterator of batches, epoch after epoch.

    Args:
        dataset: what to read.
        batch_size: samples per step over all ranks; a multiple of ``world_size``.
        seed: decides the order.
        device: where the batches go.
        rank, world_size: this process among those that share each step.
        workers: threads that read; each prepares one batch at a time.
        prefetch: batches prepared ahead in device memory, at least 1.
        shuffle: off reads the samples in their stored order.
        drop_last: leave out the samples of an epoch that do not fill a step. Off, the last step is
            short, and a rank's part of it can be empty.

    Attributes:
        position: (epoch, step) of the next batch.
        steps_per_epoch: steps of an epoch, the same on every rank.
        wait_seconds: how long the consumer waited for the last batch.
        total_wait_seconds: the sum of that over all batches so far.

    Raises:
        ValueError: naming the argument, if it does not fit the others; from ``next``, naming the
            shard, the row and the key, if a sample holds NaN or Inf.
    """

    def __init__(
        self,
        dataset: EmbeddingDataset,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("workers", workers),
            ("prefetch", prefetch),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"batch_size, rank: expected a multiple of world_size ({world_size}) and a rank "
                f"below it, got {batch_size} and {rank}"
            )
        if drop_last and batch_size > len(dataset):
            raise ValueError(
                f"batch_size: expected at most {len(dataset)}, the samples of the data, got "
                f"{batch_size}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self.shuffle = shuffle
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size, drop_last=drop_last)
        self.position = Position()
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0
        self._ahead: deque[Future[Ready]] = deque()
        self._reading = Position()
        rows = batch_size // world_size
        self._reader = BatchReader(dataset, rows, device=device, workers=workers)
        self.device = self._reader.device

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        while len(self._ahead) < self.prefetch:
            self._ahead.append(self._reader.submit(partial(self._indices, self._reading)))
            self._reading = self._after(self._reading)
        batch = self._reader.take(self._ahead[0])
        self._ahead.popleft()
        self.wait_seconds = time.perf_counter() - started
        self.total_wait_seconds += self.wait_seconds
        self.position = self._after(self.position)
        return batch

    def epoch(self) -> Iterator[Batch]:
        """The batches that are left of the current epoch."""
        current = self.position.epoch
        while self.position.epoch == current:
            yield next(self)

    def state_dict(self) -> dict[str, int]:
        """The position and the order that it refers to; JSON-ready."""
        return {
            "epoch": self.position.epoch,
            "step": self.position.step,
            **self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. The number of ranks and of threads may differ from the saved one.

        Raises:
            ValueError: naming the values, if the saved order is not this loader's order.
        """
        expected = {"epoch", "step", *self._identity()}
        if set(state) != expected:
            raise ValueError(f"loader state: expected {sorted(expected)}, got {sorted(state)}")
        changed = [
            f"{name}: expected {state[name]}, got {value}"
            for name, value in self._identity().items()
            if state[name] != value
        ]
        if changed:
            raise ValueError(
                f"the data order changed since the state was saved: {'; '.join(changed)}"
            )
        position = Position(state["epoch"], state["step"])
        if position.epoch < 0 or not 0 <= position.step < self.steps_per_epoch:
            raise ValueError(
                f"loader state: expected a step below {self.steps_per_epoch}, got {position}"
            )
        self._forget_ahead()
        self.position = self._reading = position

    def close(self) -> None:
        """Stop the threads; the loader gives no more batches."""
        self._forget_ahead()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "samples": len(self.dataset),
            "batch_size": self.batch_size,
            "shuffle": int(self.shuffle),
        }

    def _after(self, position: Position) -> Position:
        if position.step + 1 < self.steps_per_epoch:
            return Position(position.epoch, position.step + 1)
        return Position(position.epoch + 1, 0)

    def _forget_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _indices(self, position: Position) -> np.ndarray:
        samples = len(self.dataset)
        if self.shuffle:
            with _one_order_at_a_time:  # the others find it in the cache
                order, step = epoch_order(samples, self.seed, position.epoch), position.step
        else:
            start = position.step * self.batch_size
            order, step = np.arange(start, min(samples, start + self.batch_size)), 0
        return rank_share(order, step, self.batch_size, self.rank, self.world_size)
