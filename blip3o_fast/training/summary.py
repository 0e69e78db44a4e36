"""Summary numbers of a run, computed from the records of all its processes."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from blip3o_fast.training.tracking import METRICS_NAME


def summarise(
    records: Sequence[Mapping[str, Any]], *, total_steps: int, batch_size: int, seconds: float
) -> dict[str, Any]:
    """JSON-ready facts.

    Args:
        records: of ``metrics.jsonl``.
        total_steps: of the plan.
        batch_size: samples per step.
        seconds: of training, validations and checkpoints included.

    Returns:
        ``steps``, ``total_steps``, ``seconds``; ``step_seconds`` (median) and
        ``samples_per_second`` (from it); ``data_wait_seconds``, ``data_wait_share`` (of all steps);
        ``clipped_steps``, ``tightened_steps`` (under the halved bound), ``skipped_steps``;
        ``loss`` (median of the last twentieth); ``validation_seconds``; ``peak_memory_bytes``
        (device memory on CUDA, the process's on a CPU, of this process alone).
    """
    steps = [record for record in records if record["kind"] == "step"]
    validations = [record for record in records if record["kind"] == "validation"]
    durations = sorted(record["seconds"] for record in steps)
    median = durations[len(durations) // 2] if durations else 0.0
    waited = sum(record["data_wait"] for record in steps)
    bounds = [r["clip_bound"] for r in steps if r["clip_bound"] is not None]
    recent = sorted(r["loss"] for r in steps[-(len(steps) // 20 + 1) :] if r["loss"] is not None)
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "total_steps": total_steps,
        "seconds": seconds,
        "step_seconds": median,
        "samples_per_second": batch_size / median if median else 0.0,
        "data_wait_seconds": waited,
        "data_wait_share": waited / sum(durations) if sum(durations) else 0.0,
        "clipped_steps": sum(is_clipped(record) for record in steps),
        "tightened_steps": sum(bound < max(bounds) for bound in bounds),
        "skipped_steps": sum(record["skipped"] for record in steps),
        "loss": recent[len(recent) // 2] if recent else None,
        "validation_seconds": sum(record["seconds"] for record in validations),
        "peak_memory_bytes": peak_memory(),
        "metrics": METRICS_NAME,
    }


def is_clipped(record: Mapping[str, Any]) -> bool:
    """Whether clipping shortened the gradients of this step."""
    norm, bound = record["grad_norm"], record["clip_bound"]
    return norm is not None and bound is not None and norm > bound


def peak_memory() -> int | None:
    """Peak bytes, of the device on CUDA and of the process elsewhere; None if unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
