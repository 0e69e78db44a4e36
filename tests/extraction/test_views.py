"""Random square crops of an image."""

import numpy as np
import pytest
from PIL import Image

from blip3o_fast.extraction.views import crop_rng, crops


def noise(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def coordinates(width, height):
    """An image that says where each pixel is: red and green hold x and y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8))


def places(images):
    """(left, top, right, bottom) of each, whether mirrored or not."""
    return [
        (int(a[0, :, 0].min()), int(a[0, 0, 1]), int(a[0, :, 0].max()), int(a[-1, 0, 1]))
        for a in map(np.asarray, images)
    ]


def test_crops_are_squares_inside_the_image():
    image = coordinates(250, 200)
    boxes = places(crops(image, 200, crop_rng("x", 0)))
    sides = [right - left + 1 for left, _, right, _ in boxes]
    assert all(b - t == r - left for left, t, r, b in boxes)
    assert all(left >= 0 and t >= 0 and r < 250 and b < 200 for left, t, r, b in boxes)
    assert min(sides) >= 192
    assert max(sides) == 200
    assert {0, 50} <= {left for left, *_ in boxes}


def test_large_photos_are_cut_at_many_scales():
    sides = [c.width for c in crops(noise((1000, 800)), 100, crop_rng("x", 0))]
    assert 280 <= min(sides) < 320
    assert 760 < max(sides) <= 800


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (20_000, 8)])
def test_crops_of_odd_images(size):
    assert {c.size for c in crops(Image.new("RGB", size), 5, crop_rng("x", 0))} == {
        (min(size),) * 2
    }


def test_crops_depend_on_photo_and_seed_and_not_on_their_number():
    image = coordinates(255, 200)

    def cut(count, key="x", seed=0):
        return places(crops(image, count, crop_rng(key, seed)))

    assert cut(8) == cut(8)
    assert cut(8)[:3] == cut(3)
    assert cut(8) != cut(8, key="y")
    assert cut(8) != cut(8, seed=1)
    # The generator is the same on every platform and in every version.
    assert cut(2) == [(12, 1, 205, 194), (49, 0, 241, 192)]


def test_mirrored_copies_follow_their_crops():
    image = coordinates(255, 200)
    both = list(crops(image, 4, crop_rng("x", 0), mirror=True))
    assert places(both[::2]) == places(both[1::2]) == places(crops(image, 4, crop_rng("x", 0)))
    for crop, mirrored in zip(both[::2], both[1::2], strict=True):
        assert np.array_equal(np.asarray(crop)[:, ::-1], np.asarray(mirrored))
