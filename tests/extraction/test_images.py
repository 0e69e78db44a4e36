"""Awkward images: handled exactly, or refused with the reason."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from blip3o_fast.extraction.images import (
    MAX_PIXELS,
    STRIP,
    UnreadableImage,
    load_rgb,
    to_pixels,
    to_rgb,
)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def colours(data):
    return np.asarray(load_rgb(data))


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32896, 65535]], dtype=np.uint16)
    path = tmp_path / "grey.png"
    Image.fromarray(values).save(path)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    assert colours(path)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_16_bit_rgb_png():
    """Pillow cannot write these, so the file is made by hand."""

    def chunk(kind, body):
        end = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + end

    row = b"\0" + np.array([[0, 32896, 65535]], dtype=">u2").tobytes()
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert colours(b"\x89PNG\r\n\x1a\n" + chunks)[0].tolist() == [[0, 128, 255]]


def test_transparency_is_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (200, 0, 0, alpha))
    expected = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    assert colours(encoded(image, "PNG"))[0].tolist() == expected
    grey = Image.merge("LA", (Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)))
    assert colours(encoded(grey, "PNG"))[0].tolist() == [[255] * 3]


def test_transparent_colour_of_palettes_and_rgb():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    got = colours(encoded(palette, "PNG", transparency=0))[0].tolist()
    assert got == [[255] * 3, [40, 50, 60]]
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (4, 5, 6))
    got = colours(encoded(rgb, "PNG", transparency=(1, 2, 3)))[0].tolist()
    assert got == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("mode", ["CMYK", "1", "L", "YCbCr"])
def test_other_modes(mode):
    expected = {"CMYK": (255, 0, 0), "1": (255,) * 3, "L": (90,) * 3, "YCbCr": (255, 0, 0)}[mode]
    colour = {"CMYK": (0, 255, 255, 0), "1": 1, "L": 90, "YCbCr": (76, 85, 255)}[mode]
    data = encoded(Image.new(mode, (32, 16), colour), "PNG" if mode in "1L" else "JPEG")
    image = load_rgb(data)
    assert (image.mode, image.size) == ("RGB", (32, 16))
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 3


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (colours(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (3, (1, 2)), (6, (0, 1)), (8, (2, 0))]
)
def test_exif_orientation(orientation, corner):
    """A mark in the corner of a 3 x 2 image; corner is (row, column) in the upright one."""
    image = Image.new("RGB", (48, 32))
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = colours(encoded(image, "JPEG", exif=exif, quality=95, subsampling=0))
    assert upright.shape == ((32, 48, 3) if orientation in (1, 3) else (48, 32, 3))
    row, column = corner
    block = upright[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
    assert block.min() > 200
    assert upright.sum() < 1.1 * block.sum()


def test_one_pixel():
    pixels = to_pixels(load_rgb(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG")), 64)
    expected = torch.tensor([9, 8, 7], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("size", [(20_000, 3), (3, 20_000), (20_000, 200), (20_000, 1)])
def test_very_wide_and_very_tall(size):
    image = Image.new("RGB", size)
    image.paste("white", (size[0] // 2 - 1, size[1] // 2 - 1, size[0] // 2 + 1, size[1] // 2 + 1))
    pixels = to_pixels(load_rgb(encoded(image, "PNG")), 64)
    assert pixels.shape == (3, 64, 64)
    # The centre of the crop is the centre of the image.
    assert pixels[:, 28:36, 28:36].max() > 20


@pytest.mark.parametrize("size", [(640, 426), (33, 21), (2000, 70), (70, 2000), (2000, 250)])
def test_the_crop_of_a_resized_image(size):
    """Of a strip only the crop is resampled, with the result of resampling all of it."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    short = min(size)
    whole = [64 * side // short for side in size]
    left, top = ((side - 64) // 2 for side in whole)
    resized = image.resize(tuple(whole), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 64, top + 64))).astype(int)
    got = to_pixels(image, 64).permute(1, 2, 0).numpy().astype(int)
    strip = max(size) > STRIP * short
    assert np.abs(got - expected).max() <= (2 if strip else 0)
    assert (got != expected).mean() < 0.01


def jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG")


def png_with_wrong_checksum():
    data = bytearray(encoded(Image.new("RGB", (64, 64), "red"), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "cannot identify image file"),
        (jpeg()[:200], "(?i)truncated|broken data stream"),
        (jpeg()[: len(jpeg()) // 2], "truncated"),
        (png_with_wrong_checksum(), "broken PNG|decode error|broken data stream"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "mode F: .* no defined range"),
        (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "mode I.*: .* no defined range"),
    ],
)
def test_damaged_images(data, reason, tmp_path):
    with pytest.raises(UnreadableImage, match=reason):
        load_rgb(data)
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=reason):
        load_rgb(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_at_random():
    """Whatever is flipped or cut, the outcome is an image or a reason, and nothing else."""
    generator = np.random.default_rng(0)
    animation = encoded(Image.new("P", (40, 40), 3), "GIF")
    tiff = encoded(Image.new("RGBA", (40, 40), "red"), "TIFF", compression="tiff_adobe_deflate")
    webp = encoded(Image.new("RGB", (40, 40), "red"), "WEBP")
    red = Image.new("RGB", (40, 40), "red")
    avif = [encoded(red, "AVIF")] if features.check("avif") else []
    for data in (jpeg(), encoded(red, "PNG"), animation, tiff, webp, *avif):
        for _ in range(60):
            spoiled = bytearray(data[: generator.integers(1, len(data) + 1)])
            for place in generator.integers(0, len(spoiled), 3):
                spoiled[place] = generator.integers(0, 256)
            try:
                assert load_rgb(bytes(spoiled), max_pixels=1_000_000).mode == "RGB"
            except UnreadableImage as reason:
                assert str(reason)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_missing_file_and_too_many_pixels(tmp_path):
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        load_rgb(tmp_path / "absent.jpg")
    data = encoded(Image.new("1", (500, 400)), "PNG")
    assert load_rgb(data, max_pixels=200_000).size == (500, 400)
    with pytest.raises(UnreadableImage, match="500 x 400 pixels, more than 199999"):
        load_rgb(data, max_pixels=199_999)
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(UnreadableImage, match="too many pixels"):
        load_rgb(bomb)


def test_no_decoder_starts_another_program(tmp_path, monkeypatch):
    """PostScript in a file called .jpg: Pillow would start Ghostscript on it."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: started.append(args))
    with Image.open(path) as image:  # what an open without a list of formats would give
        assert image.format == "EPS"
    for data in (path, path.read_bytes()):
        with pytest.raises(UnreadableImage, match="cannot identify image file"):
            load_rgb(data)
    assert started == []


@pytest.mark.parametrize("form", ["DDS", "ICO", "PCX", "TGA", "SGI"])
def test_formats_that_are_not_on_the_list(form):
    data = encoded(Image.new("RGB", (16, 16), "red"), form)
    with pytest.raises(UnreadableImage, match="cannot identify image file"):
        load_rgb(data)


@pytest.mark.parametrize(
    "fault", [RuntimeError("Failed to decode frame"), NotImplementedError(), RecursionError()]
)
def test_whatever_a_decoder_raises_is_a_reason(monkeypatch, fault):
    def load(self):
        raise fault

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(UnreadableImage, match=type(fault).__name__):
        load_rgb(encoded(Image.new("RGB", (16, 16), "red"), "PNG"))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_read(tmp_path, kind):
    path = tmp_path / "x.png"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UnreadableImage, match="no regular file"):
        load_rgb(path)


def test_to_rgb_leaves_its_argument_alone():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert np.asarray(to_rgb(image)).min() == 255
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (10, 20, 30, 0)
