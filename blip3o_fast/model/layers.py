"""The parts of a block as modules: norms, timestep embedding, attention, MLP.

Parameter names and shapes are the published ones, so checkpoints, optimizers and sharding see the
published layout. Projections of the same input are packed into one GEMM when they run: to
concatenate weights costs far less than a second pass over the activations. A projection that is not
a plain ``nn.Linear`` (LoRA, hooks, parametrisations, FSDP units) is called as a module. The
computation of the parts is in ``model.network``.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.model import network
from blip3o_fast.model.network import KeysValues, Rotary
from blip3o_fast.ops import ImplTable, Modulation

FREQUENCY_EMBEDDING_SIZE = 256
MAX_PERIOD = 10000.0


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly a ``kind``, not compiled by itself and without hooks.

    If so, its parameters may be used without calling it. Adapters, parametrisations and FSDP change
    the class. Pruning, ``weight_norm`` and tensor parallelism add hooks.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and not any(hooks) and module._compiled_call_impl is None


def project(x: Tensor, *layers: nn.Module) -> Tensor:
    """The outputs of linear layers of the same ``x``, side by side."""
    if len(layers) > 1 and all(is_plain(layer, nn.Linear) for layer in layers):
        linears = cast("tuple[nn.Linear, ...]", layers)
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        if len(biases) in (0, len(linears)):
            weights: list[Tensor] = [linear.weight for linear in linears]
            return F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    outputs = [layer(x) for layer in layers]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class RMSNorm(nn.Module):
    """The weight of an RMSNorm; the fused ops apply ``gain`` times it."""

    def __init__(self, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.ones(width))

    def scaled_weight(self) -> Tensor:
        """``gain * weight`` ``[D]``."""
        return self.weight if self.gain == 1.0 else self.gain * self.weight


class AdaLN(nn.Module):
    """A norm weight, and the map from timestep embedding to shift and scale, zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        linear = nn.Linear(width, 2 * width)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)


def modulations(sites: Sequence[tuple[RMSNorm, AdaLN]], activated: Tensor) -> list[Modulation]:
    """Both norm weights, shift and scale of every site.

    ``activated`` ``[B, D]`` is SiLU of the time's embedding.
    """
    maps = [ada_ln.adaLN_modulation[1] for _, ada_ln in sites]
    if is_one_product(activated):
        rows = project(activated, *maps).unflatten(-1, (2 * len(sites), -1)).unbind(1)
    else:
        rows = [row for linear in maps for row in linear(activated).chunk(2, dim=-1)]
    return [
        Modulation(outer.scaled_weight(), ada_ln.norm.weight, shift, scale)
        for (outer, ada_ln), shift, scale in zip(sites, rows[::2], rows[1::2], strict=True)
    ]


def is_one_product(activated: Tensor) -> bool:
    """Whether one product gives all modulations.

    On a GPU that saves some 650 launches of a training step of base. On a CPU it costs more to copy
    86 million weights together.
    """
    return activated.is_cuda


def sinusoids(t: Tensor, scale: float) -> Tensor:
    """Times ``[B]`` to ``[B, 256]``, cosines first, in the dtype of ``t``."""
    half = FREQUENCY_EMBEDDING_SIZE // 2
    steps = torch.arange(half, device=t.device, dtype=t.dtype)
    angles = scale * t[:, None] * torch.exp(-math.log(MAX_PERIOD) / half * steps)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t through a two-layer MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.scale = config.rules.time_scale
        inner, outer = nn.Linear(FREQUENCY_EMBEDDING_SIZE, D), nn.Linear(D, D)
        for layer in (inner, outer):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(inner, nn.SiLU(), outer)

    def forward(self, t: Tensor) -> Tensor:
        """Times ``[B]`` in [0, 1] to ``[B, D]``; angles are fp32, fp64 in an fp64 model."""
        # Layers that another library has quantised have no parameters and take fp32.
        dtype = next((p.dtype for p in self.mlp.parameters()), torch.float32)
        wide = torch.promote_types(dtype, torch.float32)
        return self.mlp(sinusoids(t.to(wide), self.scale).to(dtype))


class Attention(nn.Module):
    """Parameters of grouped-query attention: H query heads, K key and value heads."""

    packed = False

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dropout = config.attention_dropout
        self.impls = impls
        self.q_proj = nn.Linear(D, self.heads * d, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, D, bias=False)
        std = config.initializer_range / math.sqrt(config.num_hidden_layers)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std / math.sqrt(self.heads))

    def drop_rate(self) -> float:
        """The probability of dropping an attention weight; 0 in evaluation mode."""
        return self.dropout if self.training else 0.0

    def out(self, attended: Tensor) -> Tensor:
        """The last projection."""
        return self.o_proj(attended)


class SelfAttention(Attention):
    """Every token of the state attends to every other."""

    rotates = True
    forward = network.attend

    def project(self, h: Tensor) -> Tensor:
        """Queries, keys and values."""
        return project(h, self.q_proj, self.k_proj, self.v_proj)


class CrossAttention(Attention):
    """Every token of the state attends to the adapted EVA tokens.

    Where the conventions say so, its queries and keys carry the positions of self-attention. Token
    i of the state can then find token i of the condition.
    """

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__(config, impls)
        self.rotates = config.rules.cross_positions

    def project(self, h: Tensor) -> Tensor:
        """Queries."""
        return self.q_proj(h)

    def forward(self, h: Tensor, rotary: Rotary, condition: Tensor | KeysValues) -> Tensor:
        """``[B, N, D]`` and adapted EVA tokens ``[B, M, D]``, or their keys and values."""
        if isinstance(condition, Tensor):
            (condition,) = keys_values([self], condition, rotary)
        return network.attend(self, h, rotary, condition)


def keys_values(
    layers: Sequence[CrossAttention], context: Tensor, rotary: Rotary
) -> list[KeysValues]:
    """Keys and values of every layer for adapted EVA tokens ``[B, M, D]``, from one product."""
    projections = [*(layer.k_proj for layer in layers), *(layer.v_proj for layer in layers)]
    kv, K = project(context, *projections), layers[0].kv_heads
    if layers[0].rotates:
        heads = len(layers) * K
        impl = layers[0].impls.rope
        # Packed: 2 L gradients have to be joined anyway, since the layers find them one by one.
        kv = ops.rope(kv, *rotary, num_heads=0, num_kv_heads=heads, impl=impl)
    split = kv.unflatten(-1, (2 * len(layers), K, -1)).unbind(2)
    return [KeysValues(*both) for both in zip(split, split[len(layers) :], strict=False)]


class SwiGLU(nn.Module):
    """``down(silu(gate(h)) * up(h))`` (arXiv:2002.05202)."""

    quantised = False
    forward = network.swiglu

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.impls = impls
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)
        self.dropout = nn.Dropout(config.dropout_prob)
        std = config.initializer_range / math.sqrt(config.num_hidden_layers)
        nn.init.normal_(self.gate_proj.weight, std=std)
        nn.init.normal_(self.up_proj.weight, std=std)
        nn.init.normal_(self.down_proj.weight, std=std / math.sqrt(inner / D))

    def gate_up(self, h: Tensor) -> Tensor:
        """The first projections, the gate first."""
        return project(h, self.gate_proj, self.up_proj)

    def activated(self, h: Tensor) -> Tensor:
        """Both projections and their product, by two kernels: the backward pass needs both."""
        return ops.swiglu(self.gate_up(h), impl=self.impls.swiglu)

    def down(self, activated: Tensor) -> Tensor:
        """The last projection, dropped out in training."""
        return self.dropout(self.down_proj(activated))
