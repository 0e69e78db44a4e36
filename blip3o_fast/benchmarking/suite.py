"""A run: choose the cases, time them, record them."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from blip3o_fast.benchmarking.cases import Case, Contender
from blip3o_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from blip3o_fast.benchmarking.checkout import open_checkout
from blip3o_fast.benchmarking.clock import Budget, Prepared, Timing, time_together
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.benchmarking.network_cases import block_cases, evaluation_cases, generate_cases
from blip3o_fast.benchmarking.op_cases import attention_cases, op_cases
from blip3o_fast.benchmarking.peers import find_peers
from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import loader_cases, training_cases

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


def run_suite(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> Record:
    """Measure. A peer that fails is left out with its reason; our own failure is an error.

    Args:
        settings: what.
        progress: is told the name of each case before it starts.
    """
    device = settings.device
    environment = describe_environment(device)
    progress("ceilings of this device")
    ceilings = measure_ceilings(device, dtypes(device), seconds=0.3 if settings.quick else 1.0)
    measurements: list[Measurement] = []
    left_out = omissions(settings)
    for case in choose_cases(settings):
        task = case.task
        progress(f"{task.group}: {task.name}, {task.shape}, {task.dtype}")
        rows, failures = measure(case, ceilings, device, settings.budget)
        measurements += rows
        left_out |= failures
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
        peers=find_peers(device),
        measurements=tuple(measurements),
        left_out=left_out,
    )


def measure(
    case: Case, ceilings: Ceilings, device: torch.device, budget: Budget
) -> tuple[list[Measurement], dict[str, str]]:
    """Time the contenders of a case in turns; those of others that failed, and why."""
    task = case.task
    ready: list[tuple[Contender, Prepared]] = []
    failures: dict[str, str] = {}
    for contender in case.contenders:
        try:
            ready.append((contender, contender.prepare()))
        except Exception as error:
            if contender.ours and not isinstance(error, torch.OutOfMemoryError):
                raise
            where = f"{task.name}, {task.shape}, {task.dtype}: {contender.name}"
            failures[where] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    timings = time_together([p for _, p in ready], device, budget)
    rows = [
        measured(case, contender, timing, ceilings)
        for (contender, _), timing in zip(ready, timings, strict=True)
    ]
    for _, prepared in ready:
        if prepared.close is not None:
            prepared.close()
    ready.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows, failures


def measured(case: Case, contender: Contender, timing: Timing, ceilings: Ceilings) -> Measurement:
    """A timing beside its limit."""
    task = case.task
    return Measurement(
        group=task.group,
        name=task.name,
        shape=task.shape,
        dtype=task.dtype,
        contender=contender.name,
        ours=contender.ours,
        median=timing.median,
        low=timing.low,
        high=timing.high,
        samples=timing.samples,
        flops=task.work.flops,
        bytes=task.work.bytes,
        limit=ceilings.seconds(task.work, task.dtype),
        bound=ceilings.bound(task.work, task.dtype),
        batch=task.samples,
        host=timing.host,
        warm=timing.warm,
        peak=timing.peak,
        queued=timing.queued,
    )


def dtypes(device: torch.device) -> tuple[str, ...]:
    """Dtypes that are measured on a device."""
    return ("fp32", "bf16") if device.type == "cpu" else ("bf16", "fp16", "fp32")


def omissions(settings: Settings) -> dict[str, str]:
    """What the settings leave out, and why."""
    left: dict[str, str] = {}
    if settings.quick:
        left["torch.compile"] = "compilation takes minutes; run without --quick"
    if settings.published is None:
        left["published implementation"] = "no checkout was named; --published FOLDER"
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
        theirs = open_checkout(settings.published, base) if dtype == "fp32" else None
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
