"""The things that are timed: one contender at one task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_fast.benchmarking.watch import Prepared
from blip3o_fast.benchmarking.work import Work

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""The largest relative distance from the reference, by dtype. Of two dtypes the coarser counts: a
velocity that was computed in bf16 may be returned in fp32."""


@dataclass(frozen=True)
class Task:
    """Something that contenders do in turns.

    Attributes:
        group: ops, attention, block, evaluation, generate, training or loader.
        name: of the op, or of the task within the group.
        shape: ``Shape.name``.
        dtype: fp32, bf16 or fp16.
        work: the work that cannot be avoided.
        samples: how many samples a call translates or trains on; 0 if that means nothing.
    """

    group: str
    name: str
    shape: str
    dtype: str
    work: Work
    samples: int = 0


@dataclass(frozen=True)
class Contender:
    """One way to do a task.

    Attributes:
        name: as tables show it.
        prepare: makes it ready. It raises if the contender cannot run here or gives other results.
        ours: whether it is this library's, so that a slowdown is a regression.
    """

    name: str
    prepare: Callable[[], Prepared]
    ours: bool = True


@dataclass(frozen=True)
class Case:
    """A task and its contenders, which are timed in turns."""

    task: Task
    contenders: tuple[Contender, ...]


class Disagreement(ValueError):
    """A contender whose results differ from the reference."""


def check_agreement(name: str, result: object, expected: object, tolerance: float = 0.0) -> None:
    """Raise ``Disagreement`` unless all tensors of both are equal up to rounding.

    ``tolerance`` is for results that were computed in a narrower dtype than they have.
    """
    got, want = list(_tensors(result)), list(_tensors(expected))
    if len(got) != len(want):
        raise Disagreement(f"{name}: expected {len(want)} tensors, got {len(got)}")
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise Disagreement(
                f"{name}: expected the shape {list(b.shape)} of the reference, got {list(a.shape)}"
            )
        difference = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        allowed = max(tolerance, *(TOLERANCE[x.dtype] for x in (a, b)))
        if not difference <= allowed:
            raise Disagreement(
                f"{name}: expected the reference up to {allowed:g} (relative), got {difference:.2g}"
            )


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors of a result in order; None is skipped."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif value is not None:
        assert isinstance(value, tuple | list)
        for part in value:
            yield from _tensors(part)
