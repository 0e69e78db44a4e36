"""A run: times the chosen cases and the ceilings of the device, and makes a record of them.

Failures do not end a run. It records the reason and goes on if a case cannot be made, or if a
contender cannot be prepared, gives wrong results or raises while it is timed. Two things end a run
early: SIGINT or SIGTERM, and a fault after which the device runs nothing more in this process. The
record then holds what was measured before.
"""

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import NamedTuple

import torch

from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from blip3o_fast.benchmarking.checkout import describe_checkout
from blip3o_fast.benchmarking.clock import Timing, time_together
from blip3o_fast.benchmarking.environment import clocks, describe_environment
from blip3o_fast.benchmarking.peers import find_peers
from blip3o_fast.benchmarking.predictions import Predictions, find_predictions
from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.benchmarking.selection import Settings, choose_sources, dtypes, omissions
from blip3o_fast.benchmarking.watch import Watch, make_watch

RUN = "the run"
"""The name of a failure that ended the run."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""


class Result(NamedTuple):
    """A contender's timing, before the ceilings of the whole run are known."""

    task: Task
    contender: str
    ours: bool
    timing: Timing
    rotation: int
    peak: int | None


def run_suite(
    settings: Settings,
    progress: Callable[[str], None] = lambda _: None,
    save: Callable[[Record], None] = lambda _: None,
) -> Record:
    """Measure.

    The device's ceilings are measured before and after, and the higher ones count. Otherwise a
    device that others used meanwhile could seem faster than its limit.

    Args:
        settings: what to measure.
        progress: called with the name of each case before it starts.
        save: called with the record so far after each case.
    """
    with stop_on_signals():
        progress("ceilings of this device")
        run = Run(settings)
        try:
            for case in run.cases():
                progress(f"{case.task.group}: {title(case.task)}")
                run.measure(case)
                save(run.record())
            run.measure_ceilings()
        except Stopped as stopped:
            run.failures[RUN] = f"stopped by {stopped}"
        except BrokenDevice as broken:
            run.failures[RUN] = str(broken)
        return run.record()


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM inside raises ``Stopped``; the next one acts as usual."""

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        raise Stopped(signal.Signals(number).name)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


class BrokenDevice(Exception):
    """The device runs nothing more in this process."""


class Run:
    """A run so far.

    Attributes:
        architecture: of a CUDA device, 90 for sm_90; None for a CPU.
        results: of every contender that was timed.
        left_out: what was not measured by choice, because a peer failed, or for lack of memory.
        failures: what was not measured because something of ours failed, and how.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, settings.device
        self.environment = describe_environment(self.device)
        self.architecture: int | None = None  # asked now: a device that broke no longer answers
        if self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            self.architecture = 10 * major + minor
        self.peers = {
            "published implementation": describe_checkout(settings.published),
            **find_peers(self.device),
        }
        self.results: list[Result] = []
        self.left_out = omissions(settings)
        self.failures: dict[str, str] = {}
        self.ceilings = self._ceilings()

    def cases(self) -> Iterator[Case]:
        """The cases that the settings ask for. A source that fails ends with its failure."""
        for index, (group, make) in enumerate(choose_sources(self.settings)):
            try:
                yield from make()
            except Exception as error:
                self.failures[f"cases of {group}, source {index}"] = explain(error)

    def measure(self, case: Case) -> None:
        """Time the contenders of a case in turns.

        Raises:
            BrokenDevice: if nothing more can be measured after it.
        """
        before = len(self.failures) + len(self.left_out)
        try:
            with ExitStack() as stack:
                self._time(case, stack)
        except Exception as error:
            self.failures[title(case.task)] = explain(error)
        if len(self.failures) + len(self.left_out) > before:
            self._check_device(case.task)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure_ceilings(self) -> None:
        """Measure the ceilings again; the higher ones count."""
        if self.device.type == "cuda":
            self.environment["clocks_after"] = clocks()
        self.ceilings = self.ceilings.best(self._ceilings())

    def record(self) -> Record:
        """The record so far."""
        settings, predictions = self.settings, self._predictions()
        return Record(
            settings={
                "quick": settings.quick,
                "groups": list(settings.groups),
                "published": settings.published is not None,
                "seconds": settings.seconds,
            },
            environment=dict(self.environment),
            bandwidth=self.ceilings.bandwidth,
            rates=self.ceilings.rates,
            transfer=self.ceilings.transfer,
            peers=self.peers,
            measurements=tuple(
                measured(r, self.ceilings, predictions.fraction(r.task, r.contender))
                for r in self.results
            ),
            left_out=dict(self.left_out),
            failures=dict(self.failures),
            predictions=predictions.about,
        )

    def _time(self, case: Case, stack: ExitStack) -> None:
        ready: list[tuple[Contender, Watch]] = []
        for contender in case.contenders:
            try:
                ready.append((contender, self._start(contender, stack)))
            except Exception as error:
                self._fail(case, contender, error)
        timings = time_together([watch for _, watch in ready], self.settings.budget)
        for (contender, watch), timing in zip(ready, timings, strict=True):
            if isinstance(timing, Exception):
                self._fail(case, contender, timing)
                continue
            about = (case.task, contender.name, contender.ours)
            self.results.append(Result(*about, timing, watch.prepared.rotation, watch.peak))

    def _start(self, contender: Contender, stack: ExitStack) -> Watch:
        prepared = contender.prepare()
        if prepared.close is not None:
            stack.callback(prepared.close)
        watch = make_watch(prepared, self.device)
        watch.start()
        return watch

    def _fail(self, case: Case, contender: Contender, error: Exception) -> None:
        ours = contender.ours and not isinstance(error, torch.OutOfMemoryError)
        reasons = self.failures if ours else self.left_out
        reasons[f"{title(case.task)}: {contender.name}"] = explain(error)

    def _check_device(self, task: Task) -> None:
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise BrokenDevice(
                f"ended after {title(task)}, since the device runs nothing more in this process: "
                f"{explain(error)}; measure the groups that follow by themselves"
            ) from None

    def _predictions(self) -> Predictions:
        if self.architecture is None:
            return Predictions("", {})
        return find_predictions(self.architecture, self.ceilings.bandwidth)

    def _ceilings(self) -> Ceilings:
        seconds = 0.2 if self.settings.quick else 1.0
        return measure_ceilings(self.device, dtypes(self.device), seconds=seconds)


def title(task: Task) -> str:
    """``evaluation, base-b64, bf16``."""
    return f"{task.name}, {task.shape}, {task.dtype}"


def explain(error: Exception) -> str:
    """Why something failed, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measured(result: Result, ceilings: Ceilings, predicted: float | None = None) -> Measurement:
    """A timing beside its limit, and beside the fraction of it that was predicted."""
    task, timing = result.task, result.timing
    return Measurement(
        group=task.group,
        name=task.name,
        shape=task.shape,
        dtype=task.dtype,
        contender=result.contender,
        ours=result.ours,
        median=timing.median,
        low=timing.low,
        high=timing.high,
        samples=timing.samples,
        flops=task.work.flops,
        bytes=task.work.bytes,
        transfer=task.work.transfer,
        limit=ceilings.seconds(task.work, task.dtype),
        bound=ceilings.bound(task.work, task.dtype),
        batch=task.samples,
        rotation=result.rotation,
        host=timing.host,
        warm=timing.warm,
        peak=result.peak,
        queued=timing.queued,
        predicted=predicted,
    )
