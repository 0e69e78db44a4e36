"""The work that cannot be avoided: floating-point operations, and bytes of memory traffic.

Flops are those of matrix products and attention, two for each multiply-add. Elementwise work counts
none, since memory bounds it everywhere. Bytes count every input and weight read once and every
output written once. An implementation that keeps everything else in registers moves just these. The
work of a fused op is in its record, ``ops.Op.work``.
"""

from itertools import pairwise
from typing import NamedTuple

from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.config import DiTConfig
from blip3o_fast.flow import find_solver
from blip3o_fast.model.adapter import CUDA_WIDTH_MULTIPLE, adapter_widths
from blip3o_fast.model.layers import FREQUENCY_EMBEDDING_SIZE

FP32 = 4


class Work(NamedTuple):
    """Floating-point operations, bytes of memory traffic, bytes transferred from the host."""

    flops: float = 0.0
    bytes: float = 0.0
    transfer: float = 0.0

    def __add__(self, other: object) -> "Work":
        if not isinstance(other, Work):
            return NotImplemented
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, factor: object) -> "Work":
        if not isinstance(factor, int | float):
            return NotImplemented
        return Work(*(a * factor for a in self))

    __rmul__ = __mul__


def attention(config: DiTConfig, batch: int, size: int, *, backward: bool = False) -> Work:
    """One attention, N queries over N keys.

    Backward needs four products. Flash kernels choose to recompute the logits, which is a fifth and
    not part of the limit.
    """
    H, K, d, N = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.num_tokens,
    )
    q, kv = batch * N * H * d * size, 2 * batch * N * K * d * size
    product = 2.0 * batch * H * N * N * d
    if backward:
        return Work(4 * product, 4 * q + 2 * kv)  # q, o, do, dq; k, v, dk, dv
    return Work(2 * product, 2 * q + kv)


def gate_up(config: DiTConfig, batch: int, size: int) -> Work:
    """The gate-up product of one MLP, and its activation."""
    rows, D, inner = batch * config.num_tokens, config.hidden_size, config.intermediate_size
    return Work(4.0 * rows * D * inner, (rows * (D + inner) + 2 * inner * D) * size)


def block(config: DiTConfig, batch: int, size: int) -> Work:
    """One block of the plain model, with its keys and values and five of its modulations."""
    rows = batch * config.num_tokens
    D, K, d = config.hidden_size, config.num_key_value_heads, config.head_dim
    shared = layer_weights(config) + D * 2 * K * d
    modulations = (5 if config.use_sandwich_norm else 2) * D * 2 * D
    flops = 2.0 * rows * shared + 2.0 * batch * modulations
    flops += 2 * attention(config, batch, size).flops
    streams = 5 * rows * D  # x, h and the condition; the new x and h
    return Work(flops, (shared + modulations + streams) * size)


def evaluation(config: DiTConfig, batch: int, size: int) -> Work:
    """One evaluation, without the work that does not depend on the state."""
    L, N, C = config.num_hidden_layers, config.num_tokens, config.clip_embedding_size
    weights = core_weights(config)
    flops = 2.0 * batch * N * weights + 2 * L * attention(config, batch, size).flops
    state = FP32 * C + size * C  # the velocity is not fp32
    return Work(flops, weights * size + batch * N * (condition_width(config) * size + state))


def conditioning(config: DiTConfig, batch: int, size: int) -> Work:
    """The work for a condition: the adapter, and the keys and values of all blocks."""
    rows, weights = batch * config.num_tokens, conditioning_weights(config)
    moved = weights + rows * (config.eva_embedding_size + condition_width(config))
    return Work(2.0 * rows * weights, moved * size)


def generation(shape: Shape, steps: int, solver: str, size: int) -> Work:
    """A whole translation: the condition once, then every evaluation."""
    config, batch = shape.config, shape.batch
    evaluations = steps * find_solver(solver).evaluations_per_step
    return conditioning(config, batch, size) + evaluation(config, batch, size) * evaluations


def training_step(shape: Shape, parameters: int, size: int) -> Work:
    """Forward with nothing hoisted, backward, AdamW.

    Backward does each product twice: for the gradient of its weight and for that of its input. The
    inputs of the model need no gradient. Bytes are those of the weights (read in both passes), of
    their fp32 gradients, and of AdamW's 7 fp32 words for each parameter (weight and two moments
    read and written, gradient read). Activations depend on the implementation and are left out.
    """
    config, batch = shape.config, shape.batch
    D, E, C = config.hidden_size, config.eva_embedding_size, config.clip_embedding_size
    forward = evaluation(config, batch, size).flops + conditioning(config, batch, size).flops
    forward += 2.0 * batch * modulation_weights(config)
    first = (adapter_widths(config)[1] + D) * E if config.use_eva_adapter else D * E
    inputs = 2.0 * batch * (config.num_tokens * (first + D * C) + FREQUENCY_EMBEDDING_SIZE * D)
    return Work(3 * forward - inputs, parameters * (2 * size + FP32 + 7 * FP32))


def padded_widths(config: DiTConfig, multiple: int = CUDA_WIDTH_MULTIPLE) -> list[int]:
    """Widths of the adapter's rows from E to D, rounded up as on CUDA."""
    return [-(-width // multiple) * multiple for width in adapter_widths(config)]


def condition_width(config: DiTConfig) -> int:
    """Elements that a condition keeps for each token: keys, values, and its stream."""
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return kept + (config.hidden_size if config.rules.aligned_stream else 0)


def layer_weights(config: DiTConfig) -> int:
    """Elements of a block's projections, without those of the condition's keys and values."""
    D, inner = config.hidden_size, config.intermediate_size
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return D * (H + 2 * K) * d + 3 * D * D + 3 * D * inner


def core_weights(config: DiTConfig) -> int:
    """Elements of the projections of an evaluation."""
    ends = 2 * config.hidden_size * config.clip_embedding_size
    return config.num_hidden_layers * layer_weights(config) + ends


def conditioning_weights(config: DiTConfig) -> int:
    """Elements of the projections that prepare a condition."""
    D, E, L = config.hidden_size, config.eva_embedding_size, config.num_hidden_layers
    kept = D * 2 * L * config.num_key_value_heads * config.head_dim
    if not config.use_eva_adapter:
        return E * D + kept
    chain = sum(wide * narrow for wide, narrow in pairwise(adapter_widths(config)))
    return chain + E * D + D * D + kept  # the residual path and the gate


def modulation_weights(config: DiTConfig) -> int:
    """Elements of the projections of a time: its embedder, and AdaLN at every site."""
    D, L = config.hidden_size, config.num_hidden_layers
    sites = (6 if config.use_sandwich_norm else 3) * L + 1
    return sites * D * 2 * D + FREQUENCY_EMBEDDING_SIZE * D + D * D
