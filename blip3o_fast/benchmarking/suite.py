"""A run: time the chosen cases, beside the ceilings of their device, into a record."""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch

from blip3o_fast.benchmarking.cases import Case, Contender, Task
from blip3o_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from blip3o_fast.benchmarking.checkout import describe_checkout
from blip3o_fast.benchmarking.clock import Budget, Timing, time_together
from blip3o_fast.benchmarking.environment import clocks, describe_environment
from blip3o_fast.benchmarking.peers import find_peers
from blip3o_fast.benchmarking.record import Measurement, Record
from blip3o_fast.benchmarking.selection import Settings, choose_cases, dtypes, omissions
from blip3o_fast.benchmarking.watch import Prepared, make_watch


class Result(NamedTuple):
    """A contender's timing, before it is known what its device reached in the whole run."""

    task: Task
    contender: str
    ours: bool
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
                failures[where] = explain(error)
        timings = time_together([prepared for _, prepared, _ in ready], watch, budget)
        results = [
            Result(task, contender.name, contender.ours, timing, prepared.rotation, peak)
            for (contender, prepared, peak), timing in zip(ready, timings, strict=True)
        ]
    del ready
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return results, failures


def explain(error: Exception) -> str:
    """Why a peer is left out, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measured(result: Result, ceilings: Ceilings) -> Measurement:
    """A timing beside its limit."""
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
    )
