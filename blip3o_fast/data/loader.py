"""Batches ahead of time: threads read rows while the device computes.

On CUDA each thread fills a page-locked buffer and starts its copy to the device on a side stream;
the consumer's stream waits for that copy alone. Reading is memory traffic, which needs no
interpreter lock, so threads suffice: no processes, no pickling, no shared memory.

The order of batches is ``blip3o_fast.data.order``'s whatever the number of threads, and the
position is that of the next batch the consumer will get, however far the threads have read ahead.
"""

import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from blip3o_fast.data.dataset import Batch, EmbeddingDataset
from blip3o_fast.data.order import Position, epoch_order, rank_share, steps_per_epoch


class _Staging:
    """Page-locked buffers of one batch, and the event after which they may be filled again."""

    def __init__(self, dataset: EmbeddingDataset, rows: int) -> None:
        def buffer(width: int) -> torch.Tensor:
            shape = (rows, dataset.tokens, width)
            return torch.empty(shape, dtype=dataset.dtype, pin_memory=width > 0)

        self.eva = buffer(dataset.eva_width)
        self.clip = buffer(dataset.clip_width)
        self.copied: torch.cuda.Event | None = None


class _Ready(NamedTuple):
    batch: Batch
    copied: torch.cuda.Event | None


class Loader:
    """An endless iterator of batches, epoch after epoch.

    Args:
        dataset: what to read.
        batch_size: samples a step over all ranks; a multiple of ``world_size``.
        seed: of the order.
        device: where the batches go.
        rank, world_size: this process among those that share each step.
        workers: threads that read; each prepares one batch at a time.
        prefetch: batches prepared ahead, at least 1, in memory of the device.
        shuffle: off reads the samples in their stored order.
        drop_last: leave out the samples of an epoch that do not fill a step. Off, the last step is
            short, and a rank's part of it can be empty.

    Attributes:
        position: (epoch, step) of the next batch.
        steps_per_epoch: steps of an epoch, the same on every rank.
        wait_seconds: how long the last batch was waited for.
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
        self.device = _with_index(torch.device(device))
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self.shuffle = shuffle
        self.steps_per_epoch = steps_per_epoch(len(dataset), batch_size, drop_last=drop_last)
        self.position = Position()
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0
        self._ahead: deque[Future[_Ready]] = deque()
        self._reading = Position()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="blip3o-loader")
        self._staging: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            # One buffer more than threads: a thread fills one while another's is being copied.
            for _ in range(workers + 1):
                self._staging.put(_Staging(dataset, batch_size // world_size))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        while len(self._ahead) < self.prefetch:
            self._ahead.append(self._threads.submit(self._prepare, self._reading))
            self._reading = self._after(self._reading)
        ready = self._ahead[0].result()
        self._ahead.popleft()
        self.wait_seconds = time.perf_counter() - started
        self.total_wait_seconds += self.wait_seconds
        self.position = self._after(self.position)
        if ready.copied is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(ready.copied)
            # The allocator must not reuse the memory before the consumer's stream is done with it.
            ready.batch.eva.record_stream(consumer)
            ready.batch.clip.record_stream(consumer)
        return ready.batch

    def epoch(self) -> Iterator[Batch]:
        """The batches that are left of the current epoch."""
        current = self.position.epoch
        while self.position.epoch == current:
            yield next(self)

    def state_dict(self) -> dict[str, int]:
        """The position, and what it is a position in; JSON-ready."""
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
        self._threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            order = epoch_order(samples, self.seed, position.epoch)
        else:
            order = np.arange(samples)
        return rank_share(order, position.step, self.batch_size, self.rank, self.world_size)

    def _prepare(self, position: Position) -> _Ready:
        indices = self._indices(position)
        if self._stream is not None:
            return self._prepare_cuda(indices, self._stream)
        batch = self.dataset.read(indices)
        if self.device.type != "cpu":
            eva, clip = batch.eva.to(self.device), batch.clip.to(self.device)
            batch = batch._replace(eva=eva, clip=clip)
        return _Ready(batch, None)

    def _prepare_cuda(self, indices: np.ndarray, stream: torch.cuda.Stream) -> _Ready:
        staging = self._staging.get()
        try:
            if staging.copied is not None:
                staging.copied.synchronize()
            rows = len(indices)
            batch = self.dataset.read_into(indices, staging.eva[:rows], staging.clip[:rows])
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                eva = batch.eva.to(self.device, non_blocking=True)
                clip = batch.clip.to(self.device, non_blocking=True)
                copied = torch.cuda.Event(blocking=True)
                copied.record(stream)
            staging.copied = copied
        finally:
            self._staging.put(staging)
        return _Ready(batch._replace(eva=eva, clip=clip), copied)


def _with_index(device: torch.device) -> torch.device:
    """Name the current CUDA device: which one is current differs from thread to thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
