"""Reading batches in threads while the device computes.

On CUDA each thread fills a page-locked buffer and copies it to the device on a stream of its own.
The consumer's stream waits for that copy only. Reading releases the interpreter lock, so threads
are enough, without processes, pickling or shared memory.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import torch

from blip3o_fast.data.dataset import Batch, EmbeddingDataset


class Ready(NamedTuple):
    """A batch. It is on the device after the event ``copied``, or already if None."""

    batch: Batch
    copied: torch.cuda.Event | None


class _Staging:
    """Page-locked buffers of one batch; they may be filled again after the event ``copied``."""

    def __init__(self, dataset: EmbeddingDataset, rows: int) -> None:
        def buffer(width: int) -> torch.Tensor:
            shape = (rows, dataset.tokens, width)
            return torch.empty(shape, dtype=dataset.dtype, device="cpu", pin_memory=width > 0)

        self.eva = buffer(dataset.eva_width)
        self.clip = buffer(dataset.clip_width)
        self.copied: torch.cuda.Event | None = None


class BatchReader:
    """Threads that read batches and send them to a device.

    Args:
        dataset: what to read.
        rows: most samples of a batch.
        device: where the batches go.
        workers: threads; each prepares one batch at a time.
        records: whether the threads read the records too. Otherwise they are read on first use.
    """

    def __init__(
        self,
        dataset: EmbeddingDataset,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        workers: int = 2,
        records: bool = False,
    ) -> None:
        self.dataset = dataset
        self.device = _with_index(torch.device(device))
        self.records = records
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="blip3o-reader")
        self._staging: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            # One buffer more than threads: a thread fills one while another's is being copied.
            for _ in range(workers + 1):
                self._staging.put(_Staging(dataset, rows))

    def submit(self, choose: Callable[[], np.ndarray]) -> Future[Ready]:
        """Have a thread call ``choose`` and read the samples that it returns."""
        return self._threads.submit(self._prepare, choose)

    def take(self, future: Future[Ready]) -> Batch:
        """Wait for the batch of a ``submit``; it can be used on the current stream.

        Raises:
            ValueError: naming the shard, the row and the key, if a sample holds NaN or Inf.
        """
        batch, copied = future.result()
        if copied is not None:
            consumer = torch.cuda.current_stream(self.device)
            consumer.wait_event(copied)
            # The allocator must not reuse the memory before the consumer's stream is finished.
            batch.eva.record_stream(consumer)
            batch.clip.record_stream(consumer)
        return batch

    def close(self) -> None:
        """Cancel what has not begun, and stop the threads."""
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, choose: Callable[[], np.ndarray]) -> Ready:
        indices = choose()
        if self._stream is None:
            batch, copied = self.dataset.read(indices), None
            if self.device.type != "cpu":
                eva, clip = batch.eva.to(self.device), batch.clip.to(self.device)
                batch = batch._replace(eva=eva, clip=clip)
        else:
            batch, copied = self._prepare_cuda(indices, self._stream)
        if self.records:
            batch.records.read()
        return Ready(batch, copied)

    def _prepare_cuda(self, indices: np.ndarray, stream: torch.cuda.Stream) -> Ready:
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
        return Ready(batch._replace(eva=eva, clip=clip), copied)


def read_ahead(
    reader: BatchReader, parts: Iterable[np.ndarray], *, prefetch: int = 2
) -> Iterator[Batch]:
    """The batch of each array of sample indices, in order; ``prefetch`` batches are read ahead."""
    ahead: deque[Future[Ready]] = deque()
    for part in parts:
        ahead.append(reader.submit(lambda part=part: part))
        if len(ahead) > prefetch:
            yield reader.take(ahead.popleft())
    while ahead:
        yield reader.take(ahead.popleft())


def _with_index(device: torch.device) -> torch.device:
    """Add the index of the current CUDA device, which is a property of the calling thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
