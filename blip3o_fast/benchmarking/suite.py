"""A run: choose the cases, time them, record them."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from blip3o_fast.benchmarking.checkout import describe_checkout, open_checkout
from blip3o_fast.benchmarking.clock import Budget, Timing, time_together
from blip3o_fast.benchmarking.environment import clocks, describe_environment
from blip3o_fast.benchmarking.network_cases import block_cases, evaluation_cases, generate_cases
from blip3o_fast.benchmarking.op_cases import attention_cases, op_cases
from blip3o_fast.benchmarking.peers import find_peers
from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import loader_cases, training_cases
from blip3o_fast.benchmarking.watch import Prepared, make_watch

GROUPS = ("ops", "attention", "block", "evaluation", "generate", "training", "loader")


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        device: where.
        quick: the shortest set that still shows every group: no compilation, few samples.
        groups: which of ``GROUPS``.
        published: checkout of the published implementation, or None.
        seconds: of measurement for a case, all contenders together.
    """

    device: torch.device
    quick: bool = False
    groups: tuple[str, ...] = GROUPS
    published: Path | None = None
    seconds: float = 2.0

    @property
    def budget(self) -> Budget:
        """Of one case."""
        if self.quick:
            return Budget(min(self.seconds, 0.3), rounds=3, most=50)
        return Budget(self.seconds, rounds=5)


class Result(NamedTuple):
    """A contender's timing, before it is known what its device reached in the whole run."""

    task: Task
    contender: Contender
    timing: Timing
    rotation: int
    peak: int | None


def run_suite(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Record:
    """Measure. A peer that fails is left out with its reason; our own failure is an error.

    The device's ceilings are measured before and after, and the higher count: a device that others
    used in between would otherwise seem faster than its limit.

    Args:
        settings: what.
        progress: is told the name of each case before it starts.
    """
    device = settings.device
    environment = describe_environment(device)
    progress("ceilings of this device")
    seconds = 0.2 if settings.quick else 1.0
    ceilings = measure_ceilings(device, dtypes(device), seconds=seconds)
    results: list[Result] = []
    left_out = omissions(settings)
    for case in choose_cases(settings):
        task = case.task
        progress(f"{task.group}: {task.name}, {task.shape}, {task.dtype}")
        timed, failures = measure(case, device, settings.budget)
        results += timed
        left_out |= failures
    if device.type == "cuda":
        environment["clocks_after"] = clocks()
    ceilings = ceilings.best(measure_ceilings(device, dtypes(device), seconds=seconds))
    return Record(
        settings={
            "quick": settings.quick,
            "groups": list(settings.groups),
            "published": settings.published is not None,
            "seconds": settings.seconds,
        },
        environment=environment,
        bandwidth=ceilings.bandwidth,
        rates=ceilings.rates,
        transfer=ceilings.transfer,
        peers={
            "published implementation": describe_checkout(settings.published),
            **find_peers(device),
        },
        measurements=tuple(measured(result, ceilings) for result in results),
        left_out=left_out,
    )


def measure(
    case: Case, device: torch.device, budget: Budget
) -> tuple[list[Result], dict[str, str]]:
    """Time the contenders of a case in turns; those of others that failed, and why.

    Raises:
        Exception: what a contender of ours raised, unless it is that memory did not suffice.
    """
    task, watch = case.task, make_watch(device)
    ready: list[tuple[Contender, Prepared, int | None]] = []
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        for contender in case.contenders:
            try:
                prepared = contender.prepare()
                if prepared.close is not None:
                    stack.callback(prepared.close)
                ready.append((contender, prepared, watch.first(prepared)))
            except Exception as error:
                if contender.ours and not isinstance(error, torch.OutOfMemoryError):
                    raise
                where = f"{task.name}, {task.shape}, {task.dtype}: {contender.name}"
                failures[where] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        timings = time_together([prepared for _, prepared, _ in ready], watch, budget)
        results = [
            Result(task, contender, timing, prepared.rotation, peak)
            for (contender, prepared, peak), timing in zip(ready, timings, strict=True)
        ]
    del ready
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return results, failures


def measured(result: Result, ceilings: Ceilings) -> Measurement:
    """A timing beside its limit."""
    task, timing = result.task, result.timing
    return Measurement(
        group=task.group,
        name=task.name,
        shape=task.shape,
        dtype=task.dtype,
        contender=result.contender.name,
        ours=result.contender.ours,
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
    )


def dtypes(device: torch.device) -> tuple[str, ...]:
    """Dtypes that are measured on a device."""
    return ("fp32", "bf16") if device.type == "cpu" else ("bf16",)


def omissions(settings: Settings) -> dict[str, str]:
    """What the settings leave out, and why."""
    left: dict[str, str] = {}
    if settings.quick:
        left["torch.compile"] = "compilation takes minutes; run without --quick"
    for group in GROUPS:
        if group not in settings.groups:
            left[group] = "not among the groups asked for"
    if settings.device.type == "cpu":
        left["Triton and CUDA kernels"] = "they run on a GPU; a CPU runs the reference ops"
    return left


def choose_cases(settings: Settings) -> Iterator[Case]:
    """The cases of a run, made lazily: each frees its tensors before the next is prepared."""
    for case in _cases(settings):
        if case.task.group in settings.groups:
            yield case


def _cases(settings: Settings) -> Iterable[Case]:
    device, compiled = settings.device, not settings.quick
    if device.type == "cpu":
        yield from cpu_cases(settings, device, compiled)
    else:
        yield from gpu_cases(settings, device, compiled)


def cpu_cases(settings: Settings, device: torch.device, compiled: bool) -> Iterator[Case]:
    """Batch 1 of base, and what trains and loads at the size of tiny."""
    base = Shape("base")
    yield from op_cases(base, "fp32", device, compiled=compiled)
    yield from attention_cases(base, "fp32", device)
    yield from block_cases(base, "fp32", device, compiled=compiled)
    for dtype in ("fp32", "bf16"):
        theirs = open_checkout(settings.published, base)
        yield from evaluation_cases(base, dtype, device, compiled=compiled, published=theirs)
    yield from generate_cases(Shape("tiny"), "fp32", device, steps=2, compiled=False)
    yield from training_cases(Shape("tiny", 2), "fp32", device, compiled=False)
    yield from loader_cases(Shape("base", 8), device)


def gpu_cases(settings: Settings, device: torch.device, compiled: bool) -> Iterator[Case]:
    """Base and large from batch 1 to 128."""
    sizes = (1, 64) if settings.quick else (1, 8, 64)
    for batch in sizes:
        yield from op_cases(Shape("base", batch), "bf16", device, compiled=compiled)
        yield from attention_cases(Shape("base", batch), "bf16", device)
    if not settings.quick:
        yield from op_cases(Shape("large", 64), "bf16", device, compiled=False)
        for tokens in (1024, 4096):
            yield from attention_cases(Shape("base", 4, tokens), "bf16", device)
    yield from block_cases(Shape("base", 1), "bf16", device, compiled=compiled)
    yield from block_cases(Shape("base", 64), "bf16", device, compiled=compiled)
    for batch in (1, 64) if settings.quick else (1, 2, 4, 8, 16, 32, 64, 128):
        shape = Shape("base", batch)
        theirs = open_checkout(settings.published, shape)
        tuned = compiled and batch in (1, 64)
        yield from evaluation_cases(shape, "bf16", device, compiled=tuned, published=theirs)
    for batch in (1, 64):
        yield from generate_cases(Shape("base", batch), "bf16", device, steps=50, compiled=False)
    if not settings.quick:
        for batch in (1, 64):
            yield from evaluation_cases(Shape("large", batch), "bf16", device, compiled=False)
        yield from generate_cases(Shape("large", 64), "bf16", device, steps=50, compiled=False)
        for tokens in (1024, 4096):
            shape = Shape("base", 4, tokens)
            yield from evaluation_cases(shape, "bf16", device, compiled=False)
    yield from training_cases(Shape("base", 128), "bf16", device, compiled=compiled)
    yield from loader_cases(Shape("base", 128), device)
