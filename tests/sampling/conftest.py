"""Small models whose every parameter matters, and noise for them."""

import pytest
import torch

from blip3o_fast import BLIP3oDiT, DiTConfig

E, C = 12, 10


def build(**changes):
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "eva_embedding_size": E,
        "clip_embedding_size": C,
        "num_tokens": 6,
        "grid": (1, 2, 3),
        "eva_adapter_layers": 2,
        "condition_dropout": 0.1,
    }
    torch.manual_seed(0)
    model = BLIP3oDiT(DiTConfig(**{**fields, **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def make_model():
    """``make_model(**config)``: nothing in it is zero or one, as it is after training."""
    return build


@pytest.fixture
def model():
    return build()


@pytest.fixture
def draw():
    """``draw(model, batch)``: EVA tokens and noise in the dtype of the model."""

    def drawn(model, batch=2):
        generator = torch.Generator().manual_seed(1)
        shape = (batch, model.config.num_tokens)
        weight = model.input_proj.weight
        eva = torch.randn(*shape, E, generator=generator).to(weight)
        return eva, torch.randn(*shape, C, generator=generator).to(weight)

    return drawn
