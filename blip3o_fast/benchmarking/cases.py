"""What is timed: one contender at one task."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip3o_fast.benchmarking.clock import Prepared
from blip3o_fast.benchmarking.work import Work

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative distance from the reference above which a contender computes something else."""


@dataclass(frozen=True)
class Task:
    """What contenders are compared on.

    Attributes:
        group: ops, attention, block, evaluation, generate, training or loader.
        name: of the op, or of the task within the group.
        shape: as ``Shape.name``.
        dtype: fp32, bf16 or fp16.
        work: that it cannot avoid.
        samples: translated or trained on by a call, 0 where that means nothing.
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
        prepare: makes it ready; raises if it cannot run here.
        ours: whether this library is to blame for its speed.
        device: the kind that it needs, None for any.
    """

    name: str
    prepare: Callable[[], Prepared]
    ours: bool = True


@dataclass(frozen=True)
class Case:
    """A task and its contenders, which are timed in turns."""

    task: Task
    contenders: tuple[Contender, ...]
    tags: frozenset[str] = field(default_factory=frozenset)


class Disagreement(ValueError):
    """A contender that does not compute what the reference does."""


def check_agreement(name: str, result: object, expected: object) -> None:
    """Raise ``Disagreement`` unless the first tensor of both is the same up to rounding."""
    got, want = (_first(value).double() for value in (result, expected))
    if got.shape != want.shape:
        raise Disagreement(
            f"{name}: expected the shape {list(want.shape)} of the reference, got {list(got.shape)}"
        )
    difference = float((got - want).norm() / want.norm().clamp_min(1e-30))
    allowed = TOLERANCE.get(_first(result).dtype, 1e-4)
    if not difference <= allowed:
        raise Disagreement(
            f"{name}: expected the reference up to {allowed:g} (relative), got {difference:.2g}"
        )


def _first(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    assert isinstance(value, tuple | list)
    return _first(value[0])
