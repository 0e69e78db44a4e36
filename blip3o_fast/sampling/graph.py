"""One evaluation, and the move of the state after it, as a CUDA graph.

An evaluation of base has about 180 launches. As a graph it is one launch for the host. All that
changes between evaluations is in device memory (``flow.trajectory``), so one graph serves every
solver and every number of steps. Tables of more than ``WINDOW`` rows are loaded window by window.

* A graph is captured for a *bucket*: a batch size that is rounded up. Samples beyond the batch are
  zero. No op mixes samples, so they cost time and do not change results.
* A warm-up runs before the capture, on its stream: Triton compiles, and cuBLAS makes its handle.
* An engine has one stream for captures. The allocator reuses memory only on the stream on which it
  was allocated, so all graphs share one private pool for intermediates. They never run at the same
  time.
* Inputs and the state are outside the pool. They are allocated on the same stream, which waits for
  every use of them. So their memory is not reused while somebody still reads it.
* cuBLAS workspaces are in the pool (``_own_workspaces``).
* The first replay is compared bit by bit with an eager run of the same evaluation.

A graph takes the memory of the state, keys and values of its bucket (4.2 MB a sample for base in
bf16) and of the activations of one evaluation. The ``GRAPHS`` graphs that were used last are kept.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.flow import Trajectory
from blip3o_fast.sampling.hoisted import Context, TimeTable

WINDOW = 64
"""Rows of a table that are loaded at a time: 29 MB of modulations for base."""

GRAPHS = 8
WARM_UP = 3
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_CAPTURE = threading.Lock()


def bucket(batch: int) -> int:
    """The smallest bucket that holds ``batch`` samples, at most 128."""
    return next(size for size in BUCKETS if size >= batch)


class GraphStore:
    """The graphs of one engine, and what they share. The lock is held while they run."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.captured: OrderedDict[object, Captured] = OrderedDict()
        self.windows: dict[tuple[int, torch.dtype], Window] = {}
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Order this use of the shared buffers after the last one, on whatever streams."""
        with self.lock:
            stream = self.stream = self.stream or torch.cuda.Stream(device)
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            try:
                yield
            finally:
                stream.wait_stream(current)

    def find(
        self,
        key: object,
        table: TimeTable,
        make: Callable[[TimeTable], tuple[Trajectory, Context]],
    ) -> "Captured":
        """The graph of ``key``, captured if there is none. This store must be ``running``.

        ``make`` gives a trajectory and a context of the bucket's size, for a table like ``table``.
        """
        if key not in self.captured:
            self.captured[key] = self._capture(table, make)
        self.captured.move_to_end(key)
        return self.captured[key]

    def _capture(
        self, table: TimeTable, make: Callable[[TimeTable], tuple[Trajectory, Context]]
    ) -> "Captured":
        assert self.stream is not None
        current = torch.cuda.current_stream(table.modulations.device)
        self.stream.wait_stream(current)
        while len(self.captured) >= GRAPHS:
            self.captured.popitem(last=False)
        # This block restores the current stream, which torch.cuda.graph does not if it fails.
        with torch.cuda.stream(self.stream):
            form = (table.solver.slots, table.solver.numbers.dtype)
            if form not in self.windows:
                self.windows[form] = Window(table)
            window = self.windows[form]
            trajectory, context = make(window.buffers)
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            try:
                graph = _capture(trajectory, self.pool, self.stream)
            except RuntimeError:
                self.clear()  # torch would go on recording to the pool
                raise
        current.wait_stream(self.stream)
        return Captured(trajectory, context, window, graph)

    def clear(self) -> None:
        """Free every graph and the pool's memory."""
        with self.lock:
            self.captured.clear()
            self.windows.clear()
            self.pool = None
            torch.cuda.empty_cache()


class Window:
    """Buffers for ``WINDOW`` rows of a table with as many slots as ``table``."""

    def __init__(self, table: TimeTable) -> None:
        solver, modulations = table.solver, table.modulations
        self.buffers = TimeTable(
            solver._replace(
                numbers=solver.numbers.new_zeros(WINDOW, solver.numbers.shape[1]),
                places=solver.places.new_zeros(WINDOW, solver.places.shape[1]),
            ),
            modulations.new_zeros(WINDOW, *modulations.shape[1:]),
            (),
        )
        self._loaded: tuple[TimeTable, int] | None = None

    def select(self, table: TimeTable, row: int) -> int:
        """Load the window of ``table`` that holds ``row``; returns the row's index in it."""
        window = row // WINDOW
        if self._loaded is None or self._loaded[0] is not table or self._loaded[1] != window:
            self._load(table, window * WINDOW)
            self._loaded = (table, window)
        return row % WINDOW

    def _load(self, table: TimeTable, first: int) -> None:
        solver, buffers = table.solver, self.buffers.solver
        places = solver.places[first : first + WINDOW]
        used, local = torch.unique(places[:, 1], return_inverse=True)
        self.buffers.modulations[: len(used)] = table.modulations.index_select(0, used)
        buffers.places[: len(places)] = torch.stack((places[:, 0], local), dim=1)
        buffers.numbers[: len(places)] = solver.numbers[first : first + WINDOW]


class Captured:
    """``Trajectory.advance`` as a graph, and the copies into and out of its buffers."""

    def __init__(
        self,
        trajectory: Trajectory,
        context: Context,
        window: Window,
        graph: torch.cuda.CUDAGraph,
    ) -> None:
        self.trajectory, self.context, self.window = trajectory, context, window
        self.graph, self._verified = graph, False

    def load(self, x: Tensor, slopes: Tensor, context: Context) -> None:
        """Copy a batch in and clear the rows beyond it."""
        own, batch, held = self.trajectory, len(x), len(self.trajectory.x)
        _fill(own.x, x)
        for buffer, rows in zip(own.slopes, slopes, strict=True):
            _fill(buffer, rows)
        for half in range(len(context.keys_values) // batch):
            given = slice(half * batch, (half + 1) * batch)
            kept = slice(half * held, (half + 1) * held)
            for buffer, rows in zip(self.context, context, strict=True):
                if buffer is not None and rows is not None:
                    _fill(buffer[kept], rows[given])

    def unload(self, x: Tensor, slopes: Tensor) -> None:
        """Copy the batch out into ``x`` and ``slopes``."""
        x.copy_(self.trajectory.x[: len(x)])
        slopes.copy_(self.trajectory.slopes[:, : len(x)])

    def replay(self, table: TimeTable, row: int) -> None:
        """Run the evaluation of ``row`` of ``table``."""
        self.trajectory.row.fill_(self.window.select(table, row))
        if self._verified:
            self.graph.replay()
        else:
            _replay_verified(self.trajectory, self.graph)
            self._verified = True


class GraphRun:
    """A micro-batch that advances by replays of a graph.

    Args:
        captured: of a bucket that holds the micro-batch.
        table: of the solver.
        x: noise ``[b, N, C]``, overwritten.
        context: of the micro-batch.
        shared: whether other micro-batches use the graph between two replays of this one. Its
            buffers are then copied in before and out after each replay.
    """

    def __init__(
        self, captured: Captured, table: TimeTable, x: Tensor, context: Context, *, shared: bool
    ) -> None:
        self.captured, self.table, self.shared = captured, table, shared
        self.kept, self.context, self.row = x, context, 0
        self.slopes = x.new_zeros(table.solver.slots, *x.shape)

    @property
    def x(self) -> Tensor:
        """The present state: this run's copy if the graph is shared, else the graph's buffer."""
        return self.kept if self.shared else self.captured.trajectory.x[: len(self.kept)]

    def advance(self) -> None:
        """Replay; copy the buffers in and out where others use them."""
        if self.row == 0 or self.shared:
            self.captured.load(self.kept, self.slopes, self.context)
        self.captured.replay(self.table, self.row)
        self.row += 1
        if self.shared:
            self.captured.unload(self.kept, self.slopes)


def _fill(buffer: Tensor, rows: Tensor) -> None:
    buffer[: rows.shape[0]] = rows
    buffer[rows.shape[0] :] = 0


def _capture(trajectory: Trajectory, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of ``advance``, captured on ``stream``, which is the current stream."""
    for _ in range(WARM_UP):
        trajectory.row.zero_()
        trajectory.advance()
    graph = torch.cuda.CUDAGraph()
    with _CAPTURE, _no_collection(), _own_workspaces():
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                trajectory.advance()
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
    """Make a capture allocate its own cuBLAS workspaces, in its pool, and forget them after it.

    torch keeps a workspace for each pair of cuBLAS handle and stream. If a graph used an older one,
    it would keep its address but not its memory. torch frees that memory when it forgets all
    workspaces, which Inductor makes it do. If a workspace of the graph stayed, later work on that
    stream would use it while the graph replays on another stream.
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


def _replay_verified(trajectory: Trajectory, graph: torch.cuda.CUDAGraph) -> None:
    """Advance twice from the same state, eagerly and by the graph, and compare the bits."""
    buffers = [trajectory.x, trajectory.slopes, trajectory.row]
    before = [x.clone() for x in buffers]
    trajectory.advance()
    eager = [x.clone() for x in buffers]
    for buffer, start in zip(buffers, before, strict=True):
        buffer.copy_(start)
    graph.replay()
    # As bytes, because NaN does not equal NaN.
    pairs = zip(buffers, eager, strict=True)
    if not all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs):
        raise RuntimeError(
            "generate: the captured CUDA graph does not reproduce the eager evaluation bit by bit; "
            "pass graph=False and report the output of 'blip3o-fast doctor'"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
