"""Writing shards in a thread while the device computes."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import torch
from torch import Tensor

from blip3o_fast.data.shards import ShardWriter
from blip3o_fast.data.sidecar import SampleRecord
from blip3o_fast.devices import DTYPES


class _OnItsWay(NamedTuple):
    """A tensor in host memory. It is complete after the event ``copied``, or already if None."""

    tensor: Tensor | None
    copied: torch.cuda.Event | None


class BackgroundWriter:
    """Adds batches to a ``ShardWriter`` in the order in which they come, in one thread.

    Leaving the ``with`` block waits until everything is written. This holds after an exception too,
    so what was translated before it is kept. Once a batch is refused, later ones are dropped.

    Args:
        writer: must not be used by anything else meanwhile.
        ahead: batches that may wait in host memory to be written, at least 1.
    """

    def __init__(self, writer: ShardWriter, ahead: int = 2) -> None:
        self.writer = writer
        self.ahead = ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blip3o-writer")
        self._waiting: deque[Future[None]] = deque()
        self._refused = False

    def add(self, eva: Tensor | None, clip: Tensor | None, records: Sequence[SampleRecord]) -> None:
        """Have the thread add a batch; raises what an earlier batch raised."""
        while len(self._waiting) >= self.ahead:
            self._waiting.popleft().result()
        towers = self._to_host(eva), self._to_host(clip)
        self._waiting.append(self._thread.submit(self._add, *towers, records))

    def finish(self) -> None:
        """Wait until everything is written; raises what ``ShardWriter.add`` raised."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.finish()

    def _to_host(self, x: Tensor | None) -> _OnItsWay:
        """Start the copy to page-locked memory on the caller's stream, in the shards' dtype."""
        if x is None or x.device.type != "cuda":
            return _OnItsWay(x, None)
        host = x.detach().to(DTYPES[self.writer.facts.dtype]).to("cpu", non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record(torch.cuda.current_stream(x.device))
        return _OnItsWay(host, copied)

    def _add(self, eva: _OnItsWay, clip: _OnItsWay, records: Sequence[SampleRecord]) -> None:
        if self._refused:
            return
        self._refused = True  # until this batch is accepted
        for tower in (eva, clip):
            if tower.copied is not None:
                tower.copied.synchronize()
        self.writer.add(eva.tensor, clip.tensor, records)
        self._refused = False
