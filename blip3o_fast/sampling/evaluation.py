"""One evaluation of the velocity, with everything hoisted that does not depend on the state.

What is left of a block: qkv GEMM, rope, attention, out GEMM, join, q GEMM, (rope,) attention, out
GEMM, join, gate-up GEMM, swiglu, down GEMM, join. Rope and attention may be one kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.ops import Impl, ImplTable, Modulation, Quantised
from blip3o_fast.sampling.conditioning import Context
from blip3o_fast.sampling.modulation import Sites
from blip3o_fast.sampling.weights import BlockWeights, PackedWeights, Weight

Rows = Tensor | Quantised
"""What a product reads: in FP8 the op that computed it has quantised it."""

Joined = tuple[Tensor, Rows]
"""The stream, and the rows that open the next sub-layer.

It has a name because torch.compile before 2.11 traces no subscript in the signature of ``join``.
"""


def evaluate(
    weights: PackedWeights,
    config: DiTConfig,
    impls: ImplTable,
    state: Tensor,
    context: Context,
    sites: Sites,
) -> Tensor:
    """The velocity at ``state``.

    Args:
        weights: of the model.
        config: of the model.
        impls: implementation of each op.
        state: ``[B, N, C]``, any floating dtype.
        context: of a batch of B' samples; B' = 2B evaluates both halves of guidance.
        sites: modulations at the time of this evaluation, for a batch of B'.

    Returns:
        ``[B', N, C]`` in the dtype of the weights, or in the state's where the state is part of it.
    """
    if sites.guess is None:
        seen = state.to(weights.dtype)
    else:
        seen = torch.empty_like(state, dtype=weights.dtype)
        torch.mul(state, sites.guess.clean, out=seen)
    x = F.linear(seen, weights.input_weight, weights.input_bias)
    halves = context.keys_values.shape[0] // x.shape[0]
    if halves > 1:
        x = torch.cat([x] * halves)
    eps = config.rms_norm_eps
    closings, openings = iter(sites.closings), iter(sites.openings)

    def join(x: Tensor, y: Tensor, scale: Tensor | None, post: Modulation | None) -> Joined:
        pre, impl = next(openings), impls.sandwich_join
        if weights.quantised and pre is not sites.openings[-1]:
            return ops.sandwich_join_quantised(x, y, scale, post, pre, eps=eps, impl=impl)
        x, h = ops.sandwich_join(x, y, scale, post, pre, eps=eps, impl=impl)
        assert h is not None
        return x, h

    if context.stream is None:
        norm = ops.sandwich_norm_quantised if weights.quantised else ops.sandwich_norm
        h = norm(x, *next(openings), eps=eps, impl=impls.sandwich_norm)
    else:
        x, h = join(context.stream, x, None, None)
    layers = context.keys_values.unbind(1)
    for block, kept in zip(weights.blocks, layers, strict=True):
        x, h = join(
            x, _self_attention(weights, block, config, impls, h), block.scales[0], next(closings)
        )
        x, h = join(
            x,
            _cross_attention(weights, block, config, impls, h, *kept.unbind(1)),
            block.scales[1],
            next(closings),
        )
        x, h = join(x, _mlp(block, impls, h), block.scales[2], next(closings))
    assert isinstance(h, Tensor)
    velocity = F.linear(h, weights.output_weight, weights.output_bias)
    if sites.guess is None:
        return velocity
    both = velocity.unflatten(0, (halves, -1))
    return torch.addcmul(both, state, sites.guess.skip).flatten(0, 1)


def _self_attention(
    weights: PackedWeights, block: BlockWeights, config: DiTConfig, impls: ImplTable, h: Rows
) -> Tensor:
    attended = ops.rope_attention(
        _linear(h, block.qkv, impls.sandwich_join),
        weights.cos,
        weights.sin,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        impl=impls.rope_attention,
        rope_impl=impls.rope,
        inplace=True,
    )
    return F.linear(attended, block.self_out)


def _cross_attention(
    weights: PackedWeights,
    block: BlockWeights,
    config: DiTConfig,
    impls: ImplTable,
    h: Rows,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    H, d = config.num_attention_heads, config.head_dim
    q = _linear(h, block.cross_q, impls.sandwich_join)
    if config.conventions == "consistent":
        attended = ops.rope_attention(
            q,
            weights.cos,
            weights.sin,
            num_heads=H,
            num_kv_heads=0,
            kept=(keys, values),
            impl=impls.rope_attention,
            rope_impl=impls.rope,
            inplace=True,
        )
    else:
        attended = ops.attention(q.unflatten(-1, (H, d)), keys, values).flatten(2)
    return F.linear(attended, block.cross_out)


def _mlp(block: BlockWeights, impls: ImplTable, h: Rows) -> Tensor:
    gate_up = _linear(h, block.gate_up, impls.sandwich_join)
    activation = ops.swiglu_quantised if isinstance(block.down, Quantised) else ops.swiglu
    return _linear(activation(gate_up, impl=impls.swiglu), block.down, impls.swiglu)


def _linear(x: Rows, weight: Weight, impl: Impl | None) -> Tensor:
    """A product; in FP8 ``impl`` is that of the op that computed ``x``."""
    if isinstance(weight, Quantised):
        assert isinstance(x, Quantised)
        return ops.scaled_linear(x, weight, impl=impl)
    assert isinstance(x, Tensor)
    return F.linear(x, weight)
