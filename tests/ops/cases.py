"""Every differentiable op as a function of its tensors alone, made from its record."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.ops import OPS, Op, Sizes
from blip3o_fast.ops._record import as_tuple
from tests.kernels.oracle import randn

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """``call(*tensors, impl=...)``; the first ``differentiable`` tensors receive gradients."""

    op: Op
    specimen: int
    template: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def differentiable(self) -> int:
        """Absent tensors are no tensors."""
        return sum(x is not None for x in self.template[: self.op.differentiable])

    def inputs(self, batch=2, tokens=3, width=6, dtype=torch.float32, device="cpu") -> list[Tensor]:
        """Tensors of one of the op's specimens, whose sizes follow from ``width``."""
        torch.manual_seed(0)
        sizes = Sizes(
            batch=batch,
            tokens=tokens,
            **dict.fromkeys(("width", "inner", "channels", "adapter"), width),
            padded=width + 2,
            head_width=2 * width,
            dtype=dtype,
            device=device,
        )
        return [x for x in self.op.specimens(sizes)[self.specimen] if isinstance(x, Tensor)]

    def leaves(self, **shape: Any) -> list[Tensor]:
        values = self.inputs(**shape)
        return [x.requires_grad_(i < self.differentiable) for i, x in enumerate(values)]

    def call(self, *tensors: Tensor, impl: ops.Impl | None) -> Any:
        """What has a gradient of the results."""
        assert self.op.backward is not None
        given = iter(tensors)
        arguments = (next(given) if isinstance(x, Tensor) else x for x in self.template)
        return as_tuple(self.op(*arguments, impl=impl))[: self.op.backward.results]


ALL_CASES = [
    Case(op, i, arguments)
    for op in OPS.values()
    if op.backward is not None
    for i, arguments in enumerate(op.specimens(Sizes()))
]
"""Every op that has a gradient, at every specimen."""

CASES = [case for case in ALL_CASES if case.specimen == 0]
"""At its typical specimen."""


def label(case: Case) -> str:
    return f"{case.name}-{case.specimen}"


def solver_update(x, velocity, slopes, coefficients, *, impl, **options):
    """The one op without a gradient; its first row of slopes becomes the velocity."""
    slot = torch.zeros(1, dtype=torch.int64, device=x.device)
    options = {"slot": slot, "clamp": coefficients.new_full((1,), 3.0), **options}
    return ops.solver_update(x, velocity, slopes, coefficients, impl=impl, **options)


def update_inputs(batch=2, tokens=3, width=6, rows=2, device="cpu") -> list[Tensor]:
    """State, velocity, slopes and coefficients."""
    shape = (batch, tokens, width)
    shapes = [shape, shape, (rows, *shape), (rows + 2,)]
    return [randn(*s, device=device, seed=i) for i, s in enumerate(shapes)]


def outputs(results: Any) -> tuple[Tensor, ...]:
    return as_tuple(results)
