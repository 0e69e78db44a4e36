"""What cannot be avoided: floating-point operations and bytes of memory traffic.

Bytes count every input read once and every output written once, nothing between. Flops count
matrix products and attention, two a multiply-add, and nothing elementwise: those ops are bound by
memory everywhere.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.config import DiTConfig
from blip3o_fast.flow.solvers import SolverName, find_solver


class Work(NamedTuple):
    """Floating-point operations, and bytes that must be read or written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: object) -> "Work":
        if not isinstance(other, Work):
            return NotImplemented
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: object) -> "Work":
        if not isinstance(factor, int | float):
            return NotImplemented
        return Work(self.flops * factor, self.bytes * factor)

    __rmul__ = __mul__


class Part(NamedTuple):
    """A kernel's worth of work, done ``count`` times."""

    name: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    work: Work

    @property
    def total(self) -> Work:
        """Of all of them."""
        return self.work * self.count


def linear(rows: int, inputs: int, outputs: int, size: int) -> Work:
    """``[rows, inputs] @ [inputs, outputs]`` of elements of ``size`` bytes."""
    elements = rows * inputs + inputs * outputs + rows * outputs
    return Work(2.0 * rows * inputs * outputs, elements * size)


def attention(config: DiTConfig, batch: int, size: int, *, backward: bool = False) -> Work:
    """One attention, N queries over N keys; backward recomputes the logits, as flash kernels do."""
    H, K, d, N = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.num_tokens,
    )
    q, kv = batch * N * H * d * size, 2 * batch * N * K * d * size
    product = 2.0 * batch * H * N * N * d
    if backward:
        return Work(5 * product, 4 * q + 2 * kv)  # q, o, do, dq; k, v, dk, dv
    return Work(2 * product, 2 * q + kv)


def row_op(name: str, shape: Shape, size: int, *, backward: bool = False) -> Work:
    """Bytes of a fused op at the widths of ``shape``; ``size`` bytes an element of activations.

    Parameters and modulations are a few rows and are left out; the solver's state and the tensors
    of the loss are fp32, its velocity is not.
    """
    config = shape.config
    rows = shape.batch * config.num_tokens
    D, inner, C = config.hidden_size, config.intermediate_size, config.clip_embedding_size
    packed = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    padded = adapter_widths(config)[1]
    forward, back = {
        "sandwich_norm": (2 * D, 3 * D),
        "sandwich_join": (4 * D, 6 * D),
        "rope": (2 * packed, 2 * packed),
        "swiglu": (3 * inner, 5 * inner),
        "adapter_norm": (2 * padded, 3 * padded),
        "adapter_mix": (4 * D, 7 * D),
    }.get(name, (0, 0))
    if name == "solver_update":  # state and previous slope, both read, and the new state
        return Work(0.0, rows * C * (4 + 2 * size + 4))
    if name == "flow_loss":
        return Work(0.0, rows * C * (3 * 4 + (2 if backward else 1) * size))
    if not forward:
        raise ValueError(f"row_op: unknown op {name!r}")
    return Work(0.0, rows * (back if backward else forward) * size)


def adapter_widths(config: DiTConfig, multiple: int = 64) -> list[int]:
    """Widths of the adapter from E to D, the inner ones rounded up as on CUDA."""
    widths = np.linspace(
        config.eva_embedding_size, config.hidden_size, config.eva_adapter_layers + 1
    )
    return [-(-int(width) // multiple) * multiple for width in widths]


def evaluation(config: DiTConfig, batch: int, size: int) -> list[Part]:
    """The kernels of one hoisted evaluation."""
    L, N = config.num_hidden_layers, config.num_tokens
    D, inner, C = config.hidden_size, config.intermediate_size, config.clip_embedding_size
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = batch * N
    row = rows * size
    rotations = [Part("rope", L, Work(0.0, 2 * row * (H + 2 * K) * d))]
    if config.conventions == "consistent":
        rotations.append(Part("rope of cross q", L, Work(0.0, 2 * row * H * d)))
    return [
        Part("input GEMM", 1, linear(rows, C, D, size)),
        Part("sandwich_join", 3 * L + 1, Work(0.0, 4 * row * D)),
        Part("qkv GEMM", L, linear(rows, D, (H + 2 * K) * d, size)),
        *rotations,
        Part("attention", 2 * L, attention(config, batch, size)),
        Part("out and cross q GEMM", 3 * L, linear(rows, D, D, size)),
        Part("gate-up GEMM", L, linear(rows, D, 2 * inner, size)),
        Part("swiglu", L, Work(0.0, 3 * row * inner)),
        Part("down GEMM", L, linear(rows, inner, D, size)),
        Part("output GEMM", 1, linear(rows, D, C, size)),
    ]


def conditioning(config: DiTConfig, batch: int, size: int) -> list[Part]:
    """The kernels that prepare a condition once: the adapter, and all keys and values."""
    rows = batch * config.num_tokens
    D, E = config.hidden_size, config.eva_embedding_size
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    parts = [Part("keys and values GEMM", 1, linear(rows, D, kept, size))]
    if not config.use_eva_adapter:
        return [Part("adapter GEMM", 1, linear(rows, E, D, size)), *parts]
    widths = adapter_widths(config, multiple=1)
    parts += [
        Part(f"adapter GEMM {i}", 1, linear(rows, wide, narrow, size))
        for i, (wide, narrow) in enumerate(pairwise(widths))
    ]
    parts.append(Part("adapter residual GEMM", 1, linear(rows, E, D, size)))
    parts.append(Part("adapter gate GEMM", 1, linear(rows, D, D, size)))
    return parts


def total(parts: list[Part]) -> Work:
    """Every kernel's flops and bytes: what a chain of perfect kernels does."""
    return sum((part.total for part in parts), Work())


def evaluation_floor(config: DiTConfig, batch: int, size: int) -> Work:
    """What one evaluation cannot avoid: its weights, its condition and its state, once."""
    C, N, D = config.clip_embedding_size, config.num_tokens, config.hidden_size
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    condition = kept + (D if config.conventions == "consistent" else 0)
    state = 4 * C + size * C  # fp32 in, velocity out
    moved = core_weights(config) * size + batch * N * (condition * size + state)
    return Work(total(evaluation(config, batch, size)).flops, moved)


def core_weights(config: DiTConfig) -> int:
    """Elements of the projections that every evaluation reads."""
    D, inner, C = config.hidden_size, config.intermediate_size, config.clip_embedding_size
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = D * (H + 2 * K) * d + 3 * D * D + 3 * D * inner
    return config.num_hidden_layers * layer + 2 * D * C


def generation(shape: Shape, steps: int, solver: SolverName, size: int) -> Work:
    """A whole translation: the condition once, then every evaluation."""
    config, batch = shape.config, shape.batch
    evaluations = steps * len(find_solver(solver).fractions)
    once = total(conditioning(config, batch, size))
    return once + evaluation_floor(config, batch, size) * evaluations


def modulation_flops(config: DiTConfig, times: int) -> float:
    """The AdaLN projections of every site, and the timestep's MLP, for that many times."""
    D = config.hidden_size
    sites = (6 if config.use_sandwich_norm else 3) * config.num_hidden_layers + 1
    return 2.0 * times * (sites * D * 2 * D + 256 * D + D * D)


def plain_evaluation(config: DiTConfig, batch: int, size: int, parameters: int) -> Work:
    """The whole network, nothing hoisted: every parameter read, every product done."""
    once = total(conditioning(config, batch, size))
    floor = evaluation_floor(config, batch, size)
    flops = floor.flops + once.flops + modulation_flops(config, batch)
    rows = batch * config.num_tokens
    C, E = config.clip_embedding_size, config.eva_embedding_size
    return Work(flops, parameters * size + rows * (2 * C + E) * size)


def training_step(shape: Shape, parameters: int, size: int) -> Work:
    """Forward, and twice that for backward; the optimizer reads and writes fp32 state.

    Bytes are those of the weights (read in both passes), the gradients and AdamW's 7 fp32 words a
    parameter (weight, two moments: read and written; gradient: read); activations, which depend on
    the implementation, are left out.
    """
    forward = plain_evaluation(shape.config, shape.batch, size, parameters)
    return Work(3 * forward.flops, parameters * (2 * size + 4 + 7 * 4))
