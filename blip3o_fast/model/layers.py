"""The parts of a block: norms, timestep embedding, attention, MLP.

Parameter names and shapes are the published ones. Projections that read the same input are separate
parameters (so checkpoints, optimizers and sharding see the published layout) and are packed into
one GEMM when they run; concatenating weights costs far less than a second pass over the
activations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.ops import ImplTable, Modulation

FREQUENCY_EMBEDDING_SIZE = 256
MAX_PERIOD = 10000.0
TIMESTEP_SCALE = {"consistent": 1000.0, "published": 1.0}


class RMSNorm(nn.Module):
    """The weight of an RMSNorm; the fused ops apply it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class AdaLN(nn.Module):
    """A norm weight and the map from timestep embedding to shift and scale, zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        linear = nn.Linear(width, 2 * width)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear)

    def modulation(self, outer: RMSNorm, activated: Tensor) -> Modulation:
        """Norm weights and shift, scale ``[B, D]``; ``activated`` is SiLU of the embedding."""
        shift, scale = self.adaLN_modulation[1](activated).chunk(2, dim=-1)
        return Modulation(outer.weight, self.norm.weight, shift, scale)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, cosines first, through a two-layer MLP."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.scale = TIMESTEP_SCALE[config.conventions]
        inner, outer = nn.Linear(FREQUENCY_EMBEDDING_SIZE, D), nn.Linear(D, D)
        for layer in (inner, outer):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(inner, nn.SiLU(), outer)

    def forward(self, t: Tensor) -> Tensor:
        """Times ``[B]`` in [0, 1] to ``[B, D]``; sinusoids in fp32, and in fp64 for fp64."""
        dtype = next(self.mlp.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)
        half = FREQUENCY_EMBEDDING_SIZE // 2
        steps = torch.arange(half, device=t.device, dtype=wide)
        angles = self.scale * t.to(wide)[:, None] * torch.exp(-math.log(MAX_PERIOD) / half * steps)
        sinusoids = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.mlp(sinusoids.to(dtype))


class Attention(nn.Module):
    """Parameters of grouped-query attention: H query heads, K key and value heads."""

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        D, d = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q ``[B, N, H, d]``, k and v ``[B, M, K, d]`` to ``[B, N, D]``."""
        dropout = self.dropout if self.training else 0.0
        return self.o_proj(ops.attention(q, k, v, dropout=dropout).flatten(2))


class SelfAttention(Attention):
    """Every token of the state attends to every other."""

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``; cos and sin ``[N, d]``."""
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        qkv = F.linear(h, torch.cat(weights))
        H, K = self.heads, self.kv_heads
        qkv = ops.rope(qkv, cos, sin, num_heads=H, num_kv_heads=K, impl=self.impls.rope)
        q, k, v = qkv.unflatten(-1, (H + 2 * K, self.head_dim)).split((H, K, K), dim=2)
        return self.attend(q, k, v)


class CrossAttention(Attention):
    """Every token of the state attends to the adapted EVA tokens.

    With ``rotary`` the queries and keys carry the positions of self-attention, so that token i of
    the state can find token i of the condition.
    """

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__(config, impls)
        self.rotary = config.conventions == "consistent"

    def keys_values(self, context: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Adapted EVA tokens ``[B, M, D]`` to k and v ``[B, M, K, d]``: constant while sampling."""
        kv = F.linear(context, torch.cat((self.k_proj.weight, self.v_proj.weight)))
        K = self.kv_heads
        if self.rotary:
            kv = ops.rope(kv, cos, sin, num_heads=0, num_kv_heads=K, impl=self.impls.rope)
        k, v = kv.unflatten(-1, (2 * K, self.head_dim)).split(K, dim=2)
        return k, v

    def forward(self, h: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, N, D]`` and ``[B, M, D]`` to ``[B, N, D]``."""
        q = self.q_proj(h)
        if self.rotary:
            q = ops.rope(q, cos, sin, num_heads=self.heads, num_kv_heads=0, impl=self.impls.rope)
        q = q.unflatten(-1, (self.heads, self.head_dim))
        return self.attend(q, *self.keys_values(context, cos, sin))


class SwiGLU(nn.Module):
    """``down(silu(gate(h)) * up(h))`` (arXiv:2002.05202)."""

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

    def forward(self, h: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``."""
        gate_up = F.linear(h, torch.cat((self.gate_proj.weight, self.up_proj.weight)))
        return self.dropout(self.down_proj(ops.swiglu(gate_up, impl=self.impls.swiglu)))
