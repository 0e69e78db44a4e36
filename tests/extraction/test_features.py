"""``extract_eva_features``: every kind of input, and its refusals."""

import pytest
import torch

from blip3o_fast.extraction.encoders import CLIP_PREPROCESSING, wrap_eva
from blip3o_fast.extraction.eva import EVAVisionConfig, EVAVisionTower
from blip3o_fast.extraction.features import extract_eva_features, extract_features
from blip3o_fast.extraction.images import load_rgb, to_pixels


@pytest.fixture(scope="module")
def eva():
    torch.manual_seed(0)
    config = EVAVisionConfig(16, 24, 2, 2, image_size=24, patch_size=4)
    tower = EVAVisionTower(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tower.eval().requires_grad_(False)


def test_paths_images_and_pixels_agree(eva, image_folder):
    paths = sorted(image_folder.rglob("*.png"))
    images = [load_rgb(path) for path in paths]
    raw = torch.stack([to_pixels(image, 24) for image in images])
    normalised = CLIP_PREPROCESSING.normalise(raw, torch.float32)
    expected = eva(normalised)
    assert expected.shape == (10, 37, 16)
    for given in (paths, [str(path) for path in paths], tuple(images), raw, normalised):
        got = extract_eva_features(given, eva, batch_size=4)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        without = extract_eva_features(given, eva, batch_size=100, include_cls=False)
        torch.testing.assert_close(without, expected[:, 1:], rtol=1e-4, atol=1e-4)
    one = extract_eva_features(paths[3], eva)
    torch.testing.assert_close(one, expected[3:4], rtol=1e-4, atol=1e-4)
    wrapped = extract_features(images[3], wrap_eva(eva, "small"))
    torch.testing.assert_close(wrapped, one, rtol=1e-4, atol=1e-4)


def test_half_precision_towers_give_fp32(eva):
    raw = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    config = EVAVisionConfig(16, 24, 2, 2, image_size=24, patch_size=4)
    half = EVAVisionTower(config).bfloat16()
    half.load_state_dict(eva.state_dict())
    got = extract_eva_features(raw, half)
    assert got.dtype == torch.float32
    expected = extract_eva_features(raw, eva)
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "expected at least one"),
        (torch.zeros(0, 3, 24, 24), "expected at least one"),
        (torch.zeros(1, 3, 24, 20), r"images: expected shape \[B, c=3, h=24, w=24\]"),
        (torch.zeros(1, 3, 20, 20, dtype=torch.uint8), r"pixels: expected shape \[B, c=3, h=24"),
        (torch.zeros(1, 3, 24, 24, dtype=torch.int64), "expected uint8 or floating point"),
        (["no/such.jpg"], r"images\[0\] \(no/such\.jpg\): FileNotFoundError"),
    ],
)
def test_refusals(eva, images, message):
    with pytest.raises(ValueError, match=message):
        extract_eva_features(images, eva)


def test_an_unreadable_image_is_named_not_replaced(eva, image_folder):
    (image_folder / "a" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images\[2\] \(.*2\.png\): empty file"):
        extract_eva_features(sorted(image_folder.rglob("*.png")), eva, batch_size=2)


def test_batch_size_and_missing_weights(eva, tmp_path):
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        extract_eva_features(torch.zeros(1, 3, 24, 24), eva, batch_size=0)
    with pytest.raises(ValueError, match=r"images\[0\] \(no/such\.jpg\): expected an image file"):
        extract_eva_features("no/such.jpg", path=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        extract_eva_features(torch.zeros(1, 3, 24, 24), path=tmp_path)
