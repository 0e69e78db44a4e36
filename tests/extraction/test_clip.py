"""CLIP through transformers, on a tiny model built from its configuration."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip3o_fast.extraction.clip import CLIPVisionTower
from blip3o_fast.extraction.encoders import CLIP_PREPROCESSING, clip_tower
from blip3o_fast.extraction.features import extract_features
from blip3o_fast.extraction.images import to_pixels

transformers = pytest.importorskip(
    "transformers", reason="transformers, of the extra extract, is not installed"
)

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**VISION)
    return transformers.CLIPVisionModel(config).eval()


@pytest.fixture
def folder(model, tmp_path):
    """A whole CLIP checkpoint, as the hub holds it: vision, text and projections."""
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)
    whole = transformers.CLIPModel(config)
    state = {k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}
    whole.vision_model.load_state_dict(state)
    whole.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def pixel_values():
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_last_hidden_state_before_the_last_norm(model, folder):
    outputs = model(pixel_values=pixel_values(), output_hidden_states=True)
    tower = CLIPVisionTower.from_pretrained(folder)
    got = tower(pixel_values())
    assert got.shape == (3, 37, 16)
    assert torch.equal(got, outputs.last_hidden_state)
    assert torch.equal(got, outputs.hidden_states[-1])
    assert not torch.allclose(got[:, 0], outputs.pooler_output)
    assert tower.revision.startswith("local-")


def test_cls_is_token_0_and_patches_are_row_major(model):
    """With branches that add nothing, only the token of the marked patch can change."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for key in state:
        if "out_proj" in key or "fc2" in key:
            state[key].zero_()
    plain = transformers.CLIPVisionModel(model.config).eval()
    plain.load_state_dict(state)
    tower = CLIPVisionTower(plain)
    black, marked = torch.zeros(1, 3, 24, 24), torch.zeros(1, 3, 24, 24)
    row, column = 2, 5
    marked[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 1
    changed = (tower(marked) - tower(black)).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1 + 6 * row + column]]


def test_features_with_and_without_cls(folder):
    tower = clip_tower(folder)
    assert (tower.tokens, tower.width, tower.grid, tower.has_cls) == (37, 16, (6, 6), True)
    raw = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    whole = extract_features(raw, tower, batch_size=2)
    assert torch.equal(extract_features(raw, tower, include_cls=False), whole[:, 1:])
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    normalised = (raw.float() / 255 - mean) / std
    torch.testing.assert_close(extract_features(normalised, tower), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(640, 426), (300, 451), (224, 224), (97, 100), (500, 65)])
def test_pixels_are_those_of_clips_processor(size):
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (size[1] // 8 + 2, size[0] // 8 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    expected = torch.as_tensor(np.array(processor(image, return_tensors="np")["pixel_values"]))
    pixels = to_pixels(image, 224)[None]
    got = CLIP_PREPROCESSING.normalise(pixels, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_field_that_changes_the_result_is_refused_by_name(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["use_rope"] = True
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: .*use_rope: expected a tower without it"):
        CLIPVisionTower.from_pretrained(folder)


def test_missing_weights_are_an_error(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc1\.weight, missing"):
        CLIPVisionTower.from_pretrained(folder)


def test_wrong_pixels_no_folder_and_no_transformers(model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"pixel_values: expected shape \[B, c=3, h=24, w=24\]"):
        CLIPVisionTower(model)(torch.zeros(1, 3, 20, 24))
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        CLIPVisionTower.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install .*\[extract\]"):
        CLIPVisionTower.from_pretrained(tmp_path)
