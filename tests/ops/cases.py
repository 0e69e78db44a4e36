"""Every differentiable op as a function of tensors alone, with small inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from tests.kernels.oracle import randn

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """``call(*tensors, impl=...)``; the first ``differentiable`` tensors receive gradients."""

    name: str
    call: Callable[..., Any]
    shapes: Callable[[int, int, int], list[tuple[int, ...]]]
    differentiable: int

    def inputs(self, batch=2, tokens=3, width=6, dtype=torch.float32, device="cpu") -> list[Tensor]:
        shapes = self.shapes(batch, tokens, width)
        return [
            randn(*s, dtype=dtype, device=device, seed=i, offset=0.5) for i, s in enumerate(shapes)
        ]

    def leaves(self, **shape: Any) -> list[Tensor]:
        values = self.inputs(**shape)
        return [x.requires_grad_(i < self.differentiable) for i, x in enumerate(values)]


def _sandwich_join(x, y, layer_scale, *norms, impl):
    post, pre = ops.Modulation(*norms[:4]), ops.Modulation(*norms[4:])
    return ops.sandwich_join(x, y, layer_scale, post, pre, eps=EPS, impl=impl)


def _flow_loss(velocity, x_t, x_1, noise, t, *, impl):
    return ops.flow_loss(
        velocity,
        x_t,
        x_1,
        noise,
        t.abs() / (1 + t.abs()),
        weights=ops.LossWeights(),
        conventions="consistent",
        masks=True,
        impl=impl,
    ).total


def _norm(b, w):
    return [(w,), (w,), (b, w), (b, w)]


CASES = [
    Case("swiglu", lambda x, *, impl: ops.swiglu(x, impl=impl), lambda b, n, w: [(b, n, 2 * w)], 1),
    Case(
        "rope",
        lambda x, c, s, *, impl: ops.rope(x, c, s, num_heads=2, num_kv_heads=1, impl=impl),
        lambda b, n, w: [(b, n, 8 * w), (n, 2 * w), (n, 2 * w)],
        1,
    ),
    Case(
        "sandwich_norm",
        lambda *tensors, impl: ops.sandwich_norm(*tensors, eps=EPS, impl=impl),
        lambda b, n, w: [(b, n, w), *_norm(b, w)],
        5,
    ),
    Case(
        "sandwich_join",
        _sandwich_join,
        lambda b, n, w: [(b, n, w), (b, n, w), (w,), *_norm(b, w), *_norm(b, w)],
        11,
    ),
    Case(
        "adapter_norm",
        lambda *tensors, impl: ops.adapter_norm(*tensors, eps=EPS, impl=impl),
        lambda b, n, w: [(b, n, w + 2), (w,), (w,)],
        3,
    ),
    Case(
        "adapter_mix",
        lambda *tensors, impl: ops.adapter_mix(*tensors, impl=impl),
        lambda b, n, w: [(b, n, w)] * 3,
        3,
    ),
    Case("flow_loss", _flow_loss, lambda b, n, w: [(b, n, w)] * 4 + [(b,)], 1),
]


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


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
