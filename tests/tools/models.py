"""A small model in which no parameter is zero or one, and inputs for it."""

import torch
from torch import nn

from blip3o_fast import BLIP3oDiT, DiTConfig


def build(**fields):
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "eva_embedding_size": 12,
        "clip_embedding_size": 10,
        "num_tokens": 6,
        "grid": (1, 2, 3),
        "eva_adapter_layers": 2,
    }
    model = BLIP3oDiT(DiTConfig(**{**small, **fields})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, 10, generator=generator)
    eva = torch.randn(batch, 6, 12, generator=generator)
    return x, torch.rand(batch, generator=generator), eva


def velocity(model):
    return model(*inputs(), return_dict=False)
