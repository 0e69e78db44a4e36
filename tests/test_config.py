"""Configuration: validation, presets, round trip."""

import dataclasses
import json

import pytest

from blip3o_fast import DiTConfig

TOKENS_2_4_4 = {"grid": (2, 4, 4), "num_tokens": 32}


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
@pytest.mark.parametrize("mode", ["patch_only", "cls_patch"])
def test_round_trip(size, mode):
    config = DiTConfig.preset(size, training_mode=mode)
    assert config.num_tokens == 256 + (mode == "cls_patch")
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_without_conventions_is_published():
    fields = DiTConfig.preset("tiny").to_dict()
    del fields["conventions"]
    assert DiTConfig.from_dict(fields).conventions == "published"


def test_what_transformers_adds_is_ignored():
    extra = {"model_type": "blip3o_clip_dit", "transformers_version": "4.57.1", "_name_or_path": ""}
    assert DiTConfig.from_dict(extra) == DiTConfig(conventions="published")


def test_depth():
    config = DiTConfig(**TOKENS_2_4_4)
    assert config.patches == (2, 4, 4) and not config.has_cls


def test_is_frozen_and_hashable():
    config = DiTConfig()
    assert hash(config) == hash(DiTConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1


def test_published_files_may_name_cls_by_tokens_alone():
    assert DiTConfig(num_tokens=257, conventions="published").has_cls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 770}, "hidden_size: expected num_attention_heads .12. times"),
        ({"hidden_size": "768"}, "hidden_size: expected an integer, got '768'"),
        ({"hidden_size": True}, "hidden_size: expected an integer, got True"),
        ({"zero_init_output": 1}, "zero_init_output: expected true or false, got 1"),
        ({"rope_theta": "x"}, "rope_theta: expected a number, got 'x'"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a number, got inf"),
        ({"rope_theta": 0.0}, "rope_theta: expected more than 0, got 0.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: expected a divisor of .* got 5"),
        ({"use_grouped_query_attention": False}, "num_key_value_heads: expected 12 without"),
        ({"image_size": 10}, "image_size: expected at least patch_size .14., got 10"),
        ({"num_tokens": 300}, "num_tokens: expected 256 for grid .* got 300"),
        ({"num_tokens": 257}, "num_tokens: expected 256 for grid .* got 257"),
        ({"training_mode": "cls"}, "training_mode: expected patch_only, cls_patch, got 'cls'"),
        ({"conventions": "both"}, "conventions: expected consistent, published, got 'both'"),
        ({"grid": (0, 4, 4)}, "grid: expected at least 1, got"),
        ({"grid": (4, 4)}, "grid: expected a list of 3 int or none, got .4, 4."),
        ({"dropout_prob": 1.0}, "dropout_prob: expected at least 0 and below 1, got 1.0"),
        ({"condition_dropout": -0.1}, "condition_dropout: expected at least 0 and below 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected more than 0"),
        (
            {"use_3d_rope": False, "max_position_embeddings": 100},
            "max_position_embeddings: expected at least num_tokens .256., got 100",
        ),
        (
            {"conventions": "published", "hidden_size": 144},
            "rotary layout of the published conventions expects a head width .* of 8, got 12",
        ),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**fields)


def test_unknown_keys_are_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown config key 'hiden_size'; did you mean 'hidden_"):
        DiTConfig.from_dict({"hiden_size": 768})
    with pytest.raises(ValueError, match="unknown config key 'zzz'; known: hidden_size"):
        DiTConfig.preset("base", zzz=1)
    with pytest.raises(ValueError, match="did you mean 'rope_theta'"):
        DiTConfig().replace(rope_teta=1.0)


def test_unknown_preset():
    with pytest.raises(ValueError, match="size: expected one of tiny, small, base, large, got 'xl"):
        DiTConfig.preset("xl")
