"""One solver step as a CUDA graph.

A step of base at batch 1 is some 350 launches; replayed as a graph it costs the host one. All that
changes from step to step stands in device memory (``sampling.stepper``), so a graph serves every
number of steps; grids longer than ``WINDOW`` steps are loaded a window at a time.

* A graph is captured for a batch *bucket*. Rows beyond the batch are zero: no op mixes samples, so
  they cost time and cannot reach a real row.
* Warm-up runs on the capture's stream before it: Triton compiles, cuBLAS makes its handle.
* An engine has one stream for captures. The allocator reuses memory only on the stream that it was
  made on, so intermediates share one private pool between graphs, which never run concurrently.
* Inputs and the state live outside the pool. They are made on that stream too, which waits for
  every use of them: memory that is freed serves nobody before.
* cuBLAS workspaces live in the pool (``_own_workspaces``).
* The first replay is compared bit by bit with the same step run eagerly.

Memory of a graph: state and keys and values of its bucket (4.2 MB a sample for base in bf16), and
the activations of one evaluation. At most ``GRAPHS`` are kept, the most recently used.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.sampling.conditioning import Context
from blip3o_fast.sampling.stepper import Stepper, StepTable

WINDOW = 64
"""Steps whose modulations are on hand at a time: 58 MB for base where two times a step differ."""

GRAPHS = 8
WARM_UP = 3
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_CAPTURE = threading.Lock()


def bucket(batch: int) -> int:
    """The smallest bucket that holds ``batch`` samples, at most 128."""
    return next(size for size in BUCKETS if size >= batch)


def refuse_outer_capture(device: torch.device) -> None:
    """Raise ``RuntimeError`` if the caller is capturing a CUDA graph of its own."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "generate: cannot run while a CUDA graph is being captured on this stream: it checks "
            "its inputs on the host and replays graphs of its own; call it outside the capture"
        )


class GraphStore:
    """The graphs of one engine, and what they share. Its lock is held while they run."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.steps: OrderedDict[object, CapturedStep] = OrderedDict()
        self.windows: dict[tuple[int, torch.dtype], WindowBuffers] = {}
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Order this use of the shared buffers after the last, whatever streams they are on."""
        with self.lock:
            stream = self.stream = self.stream or torch.cuda.Stream(device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            try:
                yield
            finally:
                stream.wait_stream(current)

    def find(
        self, key: object, table: StepTable, make: Callable[[StepTable], Stepper]
    ) -> "CapturedStep":
        """The graph of a signature, while this store is ``running``.

        ``make`` gives its stepper, with buffers of the bucket, over a table like ``table``.
        """
        if key not in self.steps:
            self.steps[key] = self._captured(table, make)
        self.steps.move_to_end(key)
        return self.steps[key]

    def _captured(self, table: StepTable, make: Callable[[StepTable], Stepper]) -> "CapturedStep":
        assert self.stream is not None
        current = torch.cuda.current_stream(table.modulations.device)
        self.stream.wait_stream(current)
        while len(self.steps) >= GRAPHS:
            self.steps.popitem(last=False)
        # One block around all that is made and run on that stream: where a capture fails,
        # torch.cuda.graph leaves the thread on it.
        with torch.cuda.stream(self.stream):
            form = (table.rows.shape[1], table.scalars.dtype)
            window = self.windows.get(form)
            if window is None:
                window = self.windows[form] = WindowBuffers(table)
            stepper = make(window.buffers)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            try:
                graph = _capture(stepper, self.pool, self.stream)
            except RuntimeError:
                self.clear()  # torch goes on recording to the pool of a capture that failed
                raise
        current.wait_stream(self.stream)
        return CapturedStep(stepper, window, graph)

    def clear(self) -> None:
        """Free every graph and the pool's memory."""
        with self.lock:
            self.steps.clear()
            self.windows.clear()
            self.pool = None


class WindowBuffers:
    """Up to ``WINDOW`` steps of any grid with as many evaluations a step as ``table``."""

    def __init__(self, table: StepTable) -> None:
        evaluations = table.rows.shape[1]
        times = WINDOW * evaluations + 1
        self.buffers = StepTable(
            table.modulations.new_zeros(times, *table.modulations.shape[1:]),
            table.rows.new_zeros(WINDOW, evaluations),
            table.scalars.new_zeros(WINDOW, table.scalars.shape[1]),
        )
        self._loaded: tuple[StepTable, int] | None = None

    def select(self, table: StepTable, step: int) -> int:
        """Have the window of ``table`` that holds ``step`` at hand; its index there."""
        window = step // WINDOW
        if self._loaded is None or self._loaded[0] is not table or self._loaded[1] != window:
            self._load(table, window * WINDOW)
            self._loaded = (table, window)
        return step % WINDOW

    def _load(self, table: StepTable, first: int) -> None:
        rows = table.rows[first : first + WINDOW]
        used, local = torch.unique(rows, return_inverse=True)
        self.buffers.modulations[: used.shape[0]] = table.modulations.index_select(0, used)
        self.buffers.rows[: local.shape[0]] = local
        self.buffers.scalars[: local.shape[0]] = table.scalars[first : first + WINDOW]


class CapturedStep:
    """A stepper's ``advance`` as a graph, with the copies in and out of its buffers."""

    def __init__(
        self, stepper: Stepper, window: WindowBuffers, graph: torch.cuda.CUDAGraph
    ) -> None:
        self.stepper, self.window, self.graph = stepper, window, graph
        self._verified = False

    def load(self, state: Tensor, context: Context, past: Tensor | None) -> None:
        """Copy a batch in and clear the rows beyond it."""
        own, batch, held = self.stepper, state.shape[0], self.stepper.state.shape[0]
        _fill(own.state, state)
        for half in range(context.keys_values.shape[0] // batch):
            given = slice(half * batch, (half + 1) * batch)
            kept = slice(half * held, (half + 1) * held)
            for buffer, rows in zip((*own.context, own.past), (*context, past), strict=True):
                if buffer is not None and rows is not None:
                    _fill(buffer[kept], rows[given])

    def unload(self, state: Tensor, past: Tensor | None) -> None:
        """Copy the batch out into ``state`` (and ``past``)."""
        own, batch, held = self.stepper, state.shape[0], self.stepper.state.shape[0]
        state.copy_(own.state[:batch])
        if own.past is not None and past is not None:
            for half in range(past.shape[0] // batch):
                past[half * batch : (half + 1) * batch] = own.past[half * held :][:batch]

    def select(self, table: StepTable, step: int) -> None:
        """Make ``step`` of ``table`` the next."""
        self.stepper.counter.fill_(self.window.select(table, step))

    def replay(self) -> None:
        """Take the selected step, and select the next of the window."""
        if self._verified:
            self.graph.replay()
        else:
            _replay_verified(self.stepper, self.graph)
            self._verified = True


def _fill(buffer: Tensor, rows: Tensor) -> None:
    buffer[: rows.shape[0]] = rows
    buffer[rows.shape[0] :] = 0


def _capture(stepper: Stepper, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of ``advance``, captured on ``stream``, which is the current one."""
    for _ in range(WARM_UP):
        stepper.counter.zero_()
        stepper.advance()
    graph = torch.cuda.CUDAGraph()
    with _CAPTURE, _no_collection(), _own_workspaces():
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                stepper.advance()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"generate: capturing a CUDA graph failed ({_first_line(error)}); end any other "
                "capture, free memory, or pass graph=False, which launches every kernel instead"
            ) from error
    return graph


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Have a capture allocate its cuBLAS workspaces, in its pool, and leave none behind.

    torch keeps one for each pair of cuBLAS handle and stream. A graph that found one there would
    keep its address and not its memory, which torch frees when it forgets all of them, as Inductor
    makes it do. One left behind would serve later work on that stream while the graph replays on
    another.
    """
    forget: Callable[[], None] | None = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if forget is None:
        raise RuntimeError(
            f"generate: expected torch._C._cuda_clearCublasWorkspaces, without which a CUDA graph "
            f"may outlive memory that it uses, torch {torch.__version__} has none; pass "
            "graph=False, which launches every kernel instead"
        )
    forget()
    try:
        yield
    finally:
        forget()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing another graph in the middle of a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _replay_verified(stepper: Stepper, graph: torch.cuda.CUDAGraph) -> None:
    """Take one step twice from the same state, eagerly and by the graph, and compare the bits."""
    buffers = [x for x in (stepper.state, stepper.past, stepper.counter) if x is not None]
    before = [x.clone() for x in buffers]
    stepper.advance()
    eager = [x.clone() for x in buffers]
    for buffer, start in zip(buffers, before, strict=True):
        buffer.copy_(start)
    graph.replay()
    # As bytes: a NaN equals nothing, and a model may give one.
    pairs = zip(buffers, eager, strict=True)
    if not all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs):
        raise RuntimeError(
            "generate: the captured CUDA graph does not reproduce the eager step bit by bit; "
            "pass graph=False and report the output of 'blip3o-fast doctor'"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
