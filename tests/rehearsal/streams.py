"""Streams, events and graphs of ``torch.cuda`` where there is no device.

They run nothing. They keep what ``torch.cuda`` would: which work is over before which, the current
stream of each thread, whether a graph is being captured. ``torch.cuda.graph`` and
``torch.cuda.stream`` are torch's own.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

Patch = Callable[[Any, str, Any], None]
"""``(owner, name, value)``: set an attribute, as ``monkeypatch.setattr`` does."""


class Stream:
    """``work`` counts what was launched on it; ``seen`` is how much of every stream's is over
    before what comes next.
    """

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        del priority
        self.device = torch.device("cuda", getattr(device, "index", None) or 0)
        self.work = 0
        self.seen: dict[Stream, int] = {}

    def launch(self) -> None:
        """Launch something."""
        self.work += 1

    def follows(self, other: "Stream") -> bool:
        """Whether what comes next comes after all that ``other`` was given."""
        return other is self or self.seen.get(other, 0) >= other.work

    def wait_stream(self, other: "Stream") -> None:
        """What comes next comes after all that ``other`` was given so far."""
        self.wait_event(other.record_event())

    def record_event(self, event: Any = None) -> "Event":
        """An event at this point."""
        event = Event() if event is None else event
        event.seen = {**self.seen, self: self.work}
        return event

    def wait_event(self, event: "Event") -> None:
        """What comes next comes after the event."""
        for stream, work in event.seen.items():
            self.seen[stream] = max(work, self.seen.get(stream, 0))

    def synchronize(self) -> None:
        """Wait on the host."""
        torch.cuda.synchronize()

    def query(self) -> bool:
        """Whether all is done."""
        return True


class Event:
    """A point in the work of a stream."""

    def __init__(self, **options: bool) -> None:
        del options
        self.seen: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        """Mark where ``stream`` is."""
        (stream or torch.cuda.current_stream()).record_event(self)  # pyright: ignore

    def wait(self, stream: Stream | None = None) -> None:
        """Have ``stream`` wait."""
        (stream or torch.cuda.current_stream()).wait_event(self)  # pyright: ignore

    def synchronize(self) -> None:
        """Wait on the host."""
        torch.cuda.synchronize()

    def query(self) -> bool:
        """Whether the point is reached."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        del end
        return 1.0


class Device:
    """What the streams of a device have been told.

    Attributes:
        told: in order, ``forget`` (cuBLAS workspaces), ``begin``, ``end`` and ``replay``.
        capturing: the stream of the capture under way.
        waited: called where the host waits for the device.
        fails: raised by the end of the next capture, as by the driver's.
    """

    def __init__(self) -> None:
        self.told: list[str] = []
        self.default = Stream()
        self.capturing: Stream | None = None
        self.waited: Callable[[str], None] = lambda what: None
        self.fails: Exception | None = None
        self._current = threading.local()

    @property
    def current(self) -> Stream:
        """The current stream of this thread."""
        return getattr(self._current, "stream", self.default)

    def set_stream(self, stream: Stream) -> None:
        """Make it the current stream of this thread."""
        self._current.stream = stream

    def begin(self, graph: "Graph") -> None:
        """Begin a capture on the current stream."""
        self.told.append("begin")
        graph.stream = self.capturing = self.current

    def end(self) -> None:
        """End it."""
        self.capturing = None
        failure, self.fails = self.fails, None
        if failure is not None:
            raise failure
        self.told.append("end")

    def install(self, patch: Patch) -> None:
        """Have ``torch.cuda`` speak to this device."""
        device = self

        class CUDAGraph(Graph):
            owner = device

        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph_pool_handle": object,
            "current_device": lambda: 0,
            "_get_device_index": lambda *given, **options: 0,
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self.default,
            "set_stream": self.set_stream,
            "is_current_stream_capturing": lambda: self.capturing is self.current,
            "synchronize": lambda device=None: self.waited("torch.cuda.synchronize"),
            "empty_cache": lambda: None,
        }.items():
            patch(torch.cuda, name, value)
        patch(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.told.append("forget"))
        patch(torch._C, "_host_emptyCache", lambda: None)


class Graph:
    """A graph; ``stream`` is the one that it was captured on."""

    owner: Device
    stream: Stream

    def capture_begin(self, pool: Any = None, **options: Any) -> None:
        """Begin."""
        del options
        self.pool = pool
        self.owner.begin(self)

    def capture_end(self) -> None:
        """End."""
        self.owner.end()

    def replay(self) -> None:
        """Launch what was captured."""
        self.owner.told.append("replay")
        self.owner.current.launch()
