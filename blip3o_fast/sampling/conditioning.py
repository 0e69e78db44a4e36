"""What the condition contributes to every evaluation, computed once a sample.

The adapter runs once, then one GEMM gives the cross-attention keys and values of all layers and,
where cross-attention has positions, one rotary call turns all the keys. The empty condition of
guidance is the same for every sample: it is prepared once, as one more row.

Memory: 2 L M K d numbers a sample, 3.1 MB in bf16 for base.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.ops import ImplTable
from blip3o_fast.sampling.weights import PackedWeights


def condition(
    weights: PackedWeights, config: DiTConfig, eva: Tensor, *, guided: bool, impls: ImplTable
) -> Tensor:
    """Keys and values of every layer, ``[L, 2, B, M, K, d]``, from EVA tokens ``[B, M, E]``.

    Guided, the batch is 2B: the empty condition is stacked under the real one.
    """
    L, K, d = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    B, M, E = eva.shape
    tokens = eva.to(weights.dtype)
    if guided:
        tokens = torch.cat((tokens, tokens.new_zeros(1, M, E)))
    packed = F.linear(weights.adapter(tokens), weights.keys_values)
    if config.conventions == "consistent":
        packed = ops.rope(
            packed, weights.cos, weights.sin, num_heads=0, num_kv_heads=L * K, impl=impls.rope
        )
    by_layer = packed.view(-1, M, 2, L, K, d).permute(3, 2, 0, 1, 4, 5)
    if not guided:
        return by_layer.contiguous()
    empty = by_layer[:, :, B:].expand(-1, -1, B, -1, -1, -1)
    return torch.cat((by_layer[:, :, :B], empty), dim=2)
