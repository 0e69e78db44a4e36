"""The cases of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from blip3o_fast.benchmarking.attention_cases import attention_cases
from blip3o_fast.benchmarking.block_cases import block_cases
from blip3o_fast.benchmarking.cases import Case
from blip3o_fast.benchmarking.checkout import open_checkout
from blip3o_fast.benchmarking.clock import Budget
from blip3o_fast.benchmarking.network_cases import evaluation_cases, generate_cases
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import loader_cases, training_cases

Source = tuple[str, Callable[[], Iterator[Case]]]
"""A group, and a function that makes its cases; they hold no tensors until they are prepared."""

GROUPS = ("ops", "attention", "block", "evaluation", "generate", "training", "loader")

SHAPES = Shape("base", 1), Shape("base", 8), Shape("base", 64)
LARGE_SHAPES = Shape("large", 64), Shape("base", 256), Shape("large", 256)
OP_SHAPES = (*SHAPES, *LARGE_SHAPES)
"""Where a whole run on a GPU times every op: both of the above."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        device: to measure on.
        quick: the shortest run that still has every group: no compilation, few samples, and of long
            calls only the contenders that a user would choose.
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
        """The time for one case."""
        if self.quick:
            return Budget(min(self.seconds, 0.3), rounds=3, most=50)
        return Budget(self.seconds, rounds=5)


def dtypes(device: torch.device) -> tuple[str, ...]:
    """Dtypes that are measured on a device."""
    return ("fp32", "bf16") if device.type == "cpu" else ("bf16",)


def omissions(settings: Settings) -> dict[str, str]:
    """What the settings leave out, and why."""
    left: dict[str, str] = {}
    if settings.quick:
        left["torch.compile"] = "compilation takes minutes; run without --quick"
        if settings.device.type == "cuda":
            left["translations without a graph"] = "they take long; run without --quick"
    for group in GROUPS:
        if group not in settings.groups:
            left[group] = "not among the groups asked for"
    if settings.device.type == "cpu":
        left["Triton and CUDA kernels"] = "they run on a GPU; a CPU runs ATen's operators"
    return left


def choose_sources(settings: Settings) -> Iterator[Source]:
    """The sources of the groups that were asked for, on the device."""
    sources = cpu_sources if settings.device.type == "cpu" else gpu_sources
    return (source for source in sources(settings) if source[0] in settings.groups)


def cpu_sources(settings: Settings) -> Iterator[Source]:
    """Batch 1 of base; tiny where base would take too long."""
    device, compiled = settings.device, not settings.quick
    base = Shape("base")
    yield "ops", partial(op_cases, base, "fp32", device, compiled=compiled)
    yield "attention", partial(attention_cases, base, "fp32", device)
    yield "block", partial(block_cases, base, "fp32", device, compiled=compiled)
    for dtype in ("fp32", "bf16"):
        yield "evaluation", _evaluations(settings, base, dtype, compiled)
    tiny = Shape("tiny")
    yield "generate", partial(generate_cases, tiny, "fp32", device, steps=2)
    yield "training", partial(training_cases, Shape("tiny", 2), "fp32", device, compiled=False)
    yield "loader", partial(loader_cases, Shape("base", 8), device)


def gpu_sources(settings: Settings) -> Iterator[Source]:
    """Base and large from batch 1 to 128."""
    device, compiled, quick = settings.device, not settings.quick, settings.quick
    for shape in SHAPES[:: 2 if quick else 1]:
        yield "ops", partial(op_cases, shape, "bf16", device, compiled=compiled)
        yield "attention", partial(attention_cases, shape, "bf16", device)
        if shape.batch != 8:
            yield "block", partial(block_cases, shape, "bf16", device, compiled=compiled)
    for batch in (1, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 128):
        tuned = compiled and batch in (1, 64)
        yield "evaluation", _evaluations(settings, Shape("base", batch), "bf16", tuned)
    for batch in (1, 64):
        yield "generate", _translations(Shape("base", batch), device, eager=not quick)
    if not quick:
        yield from _large_and_long(settings)
    shape = Shape("base", 128)
    yield "training", partial(training_cases, shape, "bf16", device, compiled=compiled)
    yield "loader", partial(loader_cases, shape, device)


def _large_and_long(settings: Settings) -> Iterator[Source]:
    """The large model, 64k rows, and more tokens than the published 256."""
    device, large = settings.device, Shape("large", 64)
    for shape in LARGE_SHAPES:
        yield "ops", partial(op_cases, shape, "bf16", device, compiled=False)
    for batch in (1, 64):
        yield "evaluation", _evaluations(settings, Shape("large", batch), "bf16", False)
    yield "generate", _translations(large, device, eager=True)
    for tokens in (1024, 4096):
        shape = Shape("base", 4, tokens)
        yield "attention", partial(attention_cases, shape, "bf16", device)
        yield "evaluation", partial(evaluation_cases, shape, "bf16", device, compiled=False)


def _translations(
    shape: Shape, device: torch.device, *, eager: bool
) -> Callable[[], Iterator[Case]]:
    return partial(generate_cases, shape, "bf16", device, steps=50, eager=eager)


def _evaluations(
    settings: Settings, shape: Shape, dtype: str, compiled: bool
) -> Callable[[], Iterator[Case]]:
    published = open_checkout(settings.published, shape)
    device = settings.device
    return partial(evaluation_cases, shape, dtype, device, compiled=compiled, published=published)
