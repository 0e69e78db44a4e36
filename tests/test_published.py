"""The published names: same signatures, same numbers, shared weights."""

import inspect

import pytest
import torch
from golden_data import MODELS, load_golden, relative_error
from torch import nn

from blip3o_fast import (
    BLIP3oCLIPDiTConfig,
    BLIP3oCLIPDiTModel,
    DiTConfig,
    accelerate,
    create_clip_reproduction_model,
)
from blip3o_fast.model import DiT


@pytest.mark.parametrize("name", MODELS)
def test_drop_in_reproduces_the_published_model(name):
    golden = load_golden(name)
    model = BLIP3oCLIPDiTModel(BLIP3oCLIPDiTConfig(**golden.config)).eval()
    model.load_state_dict(golden.weights)
    eva, noise = golden.tensors["eva"], golden.tensors["noise"]
    out = model.generate(eva, num_inference_steps=golden.steps, noise=noise)
    assert relative_error(out, golden.tensors["generate.heun.guidance1"]) < 1e-5


def test_a_cpu_generator_draws_the_published_noise():
    model = create_clip_reproduction_model(
        model_size="tiny", num_hidden_layers=1, eva_adapter_layers=1, intermediate_size=32
    ).eval()
    eva = torch.randn(2, 256, 4096)
    drawn = model.generate(eva, 1, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(2, 256, 1024, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, model.generate(eva, 1, noise=noise))


def test_configuration_defaults():
    config = BLIP3oCLIPDiTConfig()
    assert (config.conventions, config.intermediate_size) == ("published", 3072)
    assert isinstance(config, DiTConfig)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (BLIP3oCLIPDiTModel.forward, "hidden_states timestep encoder_hidden_states return_dict"),
        (
            BLIP3oCLIPDiTModel.generate,
            "eva_features num_inference_steps use_heun guidance_scale generator",
        ),
        (
            create_clip_reproduction_model,
            "config training_mode model_size use_3d_rope use_sandwich_norm use_eva_adapter "
            "eva_adapter_layers layer_scale_init_value",
        ),
    ],
)
def test_signatures_begin_as_published(function, names):
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    assert parameters[: len(names.split())] == names.split()


def test_factory():
    with torch.device("meta"):
        model = create_clip_reproduction_model(training_mode="cls_patch", model_size="small")
    assert model.config.num_tokens == 257 and model.config.has_cls
    assert model.config.conventions == "published"
    with pytest.raises(ValueError, match="unknown config key 'use_rope'"):
        create_clip_reproduction_model(use_rope=True)


class PublishedConfig:
    """Attributes of the published configuration object, which is not a dataclass."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


class PublishedModel(nn.Module):
    """Stands for the published class: same parameters, a configuration of its own kind."""

    def __init__(self, config):
        super().__init__()
        inner = DiT(DiTConfig.from_dict(config))
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.pos_embed = inner.pos_embed
        self.config = PublishedConfig(**config)


def test_accelerate_shares_the_weights():
    golden = load_golden("sandwich_rope")
    slow = PublishedModel(golden.config)
    slow.load_state_dict(golden.weights)
    slow.eval()
    fast = accelerate(slow)
    assert not fast.training and fast.config.conventions == "published"
    for name, parameter in slow.named_parameters():
        assert fast.get_parameter(name).data_ptr() == parameter.data_ptr()
    tensors = golden.tensors
    out = fast(tensors["x"], tensors["t"], tensors["eva"], return_dict=False)
    assert relative_error(out, tensors["velocity"]) < 1e-5


def test_accelerate_refuses_other_models():
    with pytest.raises(TypeError, match="expected a BLIP3oCLIPDiTConfig or a model that has one"):
        accelerate(nn.Linear(2, 2))
    golden = load_golden("sandwich_rope")
    slow = PublishedModel(golden.config)
    slow.config.hidden_size = 128
    with pytest.raises(ValueError, match=r"checkpoint: .*: expected \["):
        accelerate(slow)
