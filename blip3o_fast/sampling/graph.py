"""One evaluation, and the move of the state after it, as a CUDA graph.

An evaluation of base is some 180 launches; replayed as a graph it costs the host one. All that
changes from one to the next stands in device memory (``flow.trajectory``), so a graph serves every
solver and every number of steps; tables longer than ``WINDOW`` rows are loaded a window at a time.

* A graph is captured for a batch *bucket*. Rows beyond the batch are zero: no op mixes samples, so
  they cost time and cannot reach a real row.
* Warm-up runs on the capture's stream before it: Triton compiles, cuBLAS makes its handle.
* An engine has one stream for captures. The allocator reuses memory only on the stream that it was
  made on, so intermediates share one private pool between graphs, which never run concurrently.
* Inputs and the state live outside the pool. They are made on that stream too, which waits for
  every use of them: memory that is freed serves nobody before.
* cuBLAS workspaces live in the pool (``_own_workspaces``).
* The first replay is compared bit by bit with the same evaluation run eagerly.

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

from blip3o_fast.flow import Trajectory
from blip3o_fast.sampling.hoisted import Context, TimeTable

WINDOW = 64
"""Rows whose modulations are on hand at a time: 29 MB for base."""

GRAPHS = 8
WARM_UP = 3
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_CAPTURE = threading.Lock()


def bucket(batch: int) -> int:
    """The smallest bucket that holds ``batch`` samples, at most 128."""
    return next(size for size in BUCKETS if size >= batch)


class GraphStore:
    """The graphs of one engine, and what they share. Its lock is held while they run."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.captured: OrderedDict[object, Captured] = OrderedDict()
        self.windows: dict[tuple[int, torch.dtype], Window] = {}
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
        self,
        key: object,
        table: TimeTable,
        make: Callable[[TimeTable], tuple[Trajectory, Context]],
    ) -> "Captured":
        """The graph of a signature, while this store is ``running``.

        ``make`` gives its trajectory and context, of the bucket, over a table like ``table``.
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
        # One block around all that is made and run on that stream: where a capture fails,
        # torch.cuda.graph leaves the thread on it.
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
                self.clear()  # torch goes on recording to the pool of a capture that failed
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
    """Up to ``WINDOW`` rows of any table with as many slots as ``table``."""

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
        """Have the window of ``table`` that holds ``row`` at hand; its index there."""
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
    """A trajectory's ``advance`` as a graph, with the copies in and out of its buffers."""

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
        """Take the evaluation of ``row`` of ``table``."""
        self.trajectory.row.fill_(self.window.select(table, row))
        if self._verified:
            self.graph.replay()
        else:
            _replay_verified(self.trajectory, self.graph)
            self._verified = True


class GraphRun:
    """A micro-batch that moves by replays.

    Args:
        captured: of a bucket that holds the micro-batch.
        table: of the solver.
        x: noise ``[b, N, C]``, overwritten.
        context: of the micro-batch.
        shared: whether others replay ``captured`` between two moves of this run; the graph's
            buffers are then copied in and out around every one.
    """

    def __init__(
        self, captured: Captured, table: TimeTable, x: Tensor, context: Context, *, shared: bool
    ) -> None:
        self.captured, self.table, self.shared = captured, table, shared
        self.kept, self.context, self.row = x, context, 0
        self.slopes = x.new_zeros(table.solver.slots, *x.shape)

    @property
    def x(self) -> Tensor:
        """This run's copy if the graph is shared, the graph's buffer otherwise."""
        return self.kept if self.shared else self.captured.trajectory.x[: len(self.kept)]

    def advance(self) -> None:
        """Load what is needed, replay, and keep what others would overwrite."""
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
    """A graph of ``advance``, captured on ``stream``, which is the current one."""
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


def _replay_verified(trajectory: Trajectory, graph: torch.cuda.CUDAGraph) -> None:
    """Move twice from the same state, eagerly and by the graph, and compare the bits."""
    buffers = [trajectory.x, trajectory.slopes, trajectory.row]
    before = [x.clone() for x in buffers]
    trajectory.advance()
    eager = [x.clone() for x in buffers]
    for buffer, start in zip(buffers, before, strict=True):
        buffer.copy_(start)
    graph.replay()
    # As bytes: a NaN equals nothing, and a model may give one.
    pairs = zip(buffers, eager, strict=True)
    if not all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs):
        raise RuntimeError(
            "generate: the captured CUDA graph does not reproduce the eager evaluation bit by bit; "
            "pass graph=False and report the output of 'blip3o-fast doctor'"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
