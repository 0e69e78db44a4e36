"""The published names: same signatures, same numbers, shared weights."""

import inspect
import json
import os
import warnings

import pytest
import torch
from golden_data import MODELS, load_golden, relative_error
from small_data import small_model
from torch import nn

import blip3o_fast
from blip3o_fast import (
    BLIP3oCLIPDiTConfig,
    BLIP3oCLIPDiTModel,
    DiTConfig,
    accelerate,
    create_clip_reproduction_model,
    load_trained_model,
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


def test_names_of_the_published_module():
    assert blip3o_fast.ImprovedBLIP3oCLIPDiTModel is BLIP3oCLIPDiTModel
    assert blip3o_fast.create_improved_clip_reproduction_model is create_clip_reproduction_model
    golden = load_golden("sandwich_rope")
    model = BLIP3oCLIPDiTModel(BLIP3oCLIPDiTConfig(**golden.config))
    model.pos_embed.requires_grad_(False)
    everything = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == everything
    assert model.num_parameters(only_trainable=True) == everything - model.pos_embed.numel()
    assert model.get_num_parameters() == model.num_parameters(only_trainable=True)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing


def test_unknown_keywords_are_named_once_and_ignored():
    golden = load_golden("sandwich_rope")
    model = BLIP3oCLIPDiTModel(BLIP3oCLIPDiTConfig(**golden.config)).eval()
    model.load_state_dict(golden.weights)
    t, x, eva = (golden.tensors[name] for name in ("t", "x", "eva"))
    with pytest.warns(UserWarning, match="forward: ignores 'attention_mask'"):
        out = model(x, t[:1], eva, return_dict=False, attention_mask=None)
    assert torch.equal(out, model(x, t[:1].expand(len(x)), eva, return_dict=False))
    noise = golden.tensors["noise"]
    with pytest.warns(UserWarning, match="generate: ignores 'temperature'"):
        out = model.generate(eva, 2, noise=noise, temperature=0.7, solver="midpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = model.generate(eva, 2, noise=noise, temperature=0.7, solver="midpoint")
    assert torch.equal(out, again)
    assert not torch.equal(out, model.generate(eva, 2, noise=noise)), "known options count"


def test_configuration_goes_to_a_folder_and_back(tmp_path):
    config = BLIP3oCLIPDiTConfig.preset("tiny", image_size=112, num_tokens=64)
    config.save_pretrained(tmp_path / "new")
    read = BLIP3oCLIPDiTConfig.from_pretrained(tmp_path / "new")
    assert read == config and type(read) is BLIP3oCLIPDiTConfig
    assert (read.grid_size, read.model_type) == (8, "blip3o_clip_dit")
    assert json.loads(config.to_json_string())["model_type"] == "blip3o_clip_dit"


def test_a_table_of_positions_that_is_too_short_is_left_out():
    """As the published forward does; a model of our own conventions refuses to do without."""
    golden = load_golden("cls_patch_posembed")
    model = BLIP3oCLIPDiTModel(BLIP3oCLIPDiTConfig(**golden.config)).eval()
    model.load_state_dict(golden.weights)
    t, x, eva = (golden.tensors[name] for name in ("t", "x", "eva"))
    before = model(x, t, eva, return_dict=False)
    torch.nn.init.normal_(model.pos_embed)
    assert torch.equal(model(x, t, eva, return_dict=False), before)
    with torch.device("meta"):
        made = create_clip_reproduction_model(training_mode="cls_patch", use_3d_rope=False)
    assert made.pos_embed.shape[1] == 256 and not made.config.has_positions
    with pytest.raises(ValueError, match="max_position_embeddings: expected at least num_tokens"):
        DiTConfig(**golden.config)


def test_features_with_a_cls_token_lose_it_for_a_model_without():
    golden = load_golden("sandwich_rope")
    model = BLIP3oCLIPDiTModel(BLIP3oCLIPDiTConfig(**golden.config)).eval()
    eva, noise = golden.tensors["eva"], golden.tensors["noise"]
    longer = torch.cat((torch.randn_like(eva[:, :1]), eva), dim=1)
    assert torch.equal(model.generate(longer, 1, noise=noise), model.generate(eva, 1, noise=noise))
    with pytest.raises(ValueError, match="eva_features: expected"):
        model.generate(eva[:, 2:], 1, noise=noise)


def test_without_a_path_the_newest_run_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no training run in \./checkpoints; pass"):
        load_trained_model()
    for age, name in enumerate(("new", "old")):
        small_model(seed=age).save_pretrained(tmp_path / "checkpoints" / name)
        os.utime(tmp_path / "checkpoints" / name, (1000 - age, 1000 - age))
    (tmp_path / "checkpoints" / "no_run").mkdir()
    expected = small_model(seed=0).state_dict()["input_proj.weight"]
    assert torch.equal(load_trained_model().input_proj.weight, expected)
    small_model(seed=5).save_pretrained(tmp_path / "checkpoints")
    expected = small_model(seed=5).state_dict()["input_proj.weight"]
    assert torch.equal(load_trained_model().input_proj.weight, expected)


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
