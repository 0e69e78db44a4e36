"""How far apart two computations of the same number may be, from the arithmetic alone."""

import torch

from blip3o_fast import DiTConfig

TIMES = 256
"""Sinusoids of a time."""


def rounding_bound(dtype: torch.dtype, roundings: float) -> float:
    """A relative error that ``roundings``, one upon the other, do not exceed.

    Each errs by u = eps / 2 at most, in either direction, so that n of them walk at random:
    ``8 sqrt(n) u`` is exceeded with a probability of 2 exp(-32) (Higham and Mary, 2019,
    doi:10.1137/18M1226312). The limits of this function hold on any machine, whatever the order of
    its sums and the width of its registers.
    """
    return 8 * roundings**0.5 * torch.finfo(dtype).eps / 2


def roundings_of(config: DiTConfig, evaluations: int = 1) -> int:
    """Those between the inputs of a network and the state after ``evaluations`` of it.

    A sum of n numbers counts n, every other operation of the longest path one.
    """
    D, d, N = config.hidden_size, config.head_dim, config.num_tokens
    norm = D + 10
    attention = D + d + N + config.num_attention_heads * d + 10
    mlp = D + config.intermediate_size + 5
    layer = 2 * (attention + 2 * norm) + mlp + 2 * norm
    adapter = (config.eva_adapter_layers + 1) * (2 * config.eva_embedding_size + 2 * D)
    before = TIMES + 2 * D + adapter + config.clip_embedding_size
    after = norm + D + 10
    return evaluations * (before + config.num_hidden_layers * layer + after)
