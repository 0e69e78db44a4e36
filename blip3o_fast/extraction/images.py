"""Any image file to 8-bit RGB, and RGB to the square that a tower looks at.

Only the decoders in ``FORMATS`` are tried, since Pillow has some that start other programs.

Transparent pixels are composited on white, 16-bit greys are scaled (not clipped), EXIF orientation
is applied, CMYK and palettes are converted and an animation gives its first frame. What cannot be
read raises ``UnreadableImage`` with the reason; nothing is ever replaced by a black image.
"""

import io
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from blip3o_fast.installation import install
from blip3o_fast.untrusted import reason

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Names of Pillow's decoders."""
MAX_FILE_BYTES = 1 << 28
"""Largest image file that is read."""
MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels: a quarter of a gigabyte of RGB, Pillow's own limit."""

STRIP = 8
"""Ratio of the sides beyond which an image is not resized whole."""


class UnreadableImage(ValueError):
    """A file that holds no image we can decode; its message is the reason."""


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(f"reading images needs Pillow: {install('images')}") from None
    return Image


def load_rgb(data: Path | bytes, max_pixels: int = MAX_PIXELS) -> "Image":
    """Decode a file or its bytes to an RGB image.

    Args:
        data: path or encoded bytes.
        max_pixels: width times height beyond which nothing is decoded.

    Raises:
        UnreadableImage: when it is no image, is damaged or is too large.
    """
    image_module = pillow()
    encoded = image_bytes(data)
    try:
        with image_module.open(io.BytesIO(encoded), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImage(
                    f"{image.width} x {image.height} pixels, more than {max_pixels}"
                )
            if min(image.size) < 1:
                raise UnreadableImage(f"{image.width} x {image.height} pixels")
            return to_rgb(image)
    except UnreadableImage:
        raise
    except image_module.DecompressionBombError as error:
        raise UnreadableImage(f"too many pixels: {error}") from None
    except Exception as error:  # decoders raise whatever they like on damaged files
        text = reason(error).partition(" <_io.BytesIO")[0]
        raise UnreadableImage(text) from None


def image_bytes(data: Path | bytes) -> bytes:
    """The encoded bytes of an image, read if it is a file.

    Raises:
        UnreadableImage: when there are none, or too many.
    """
    if isinstance(data, Path):
        try:
            facts = data.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableImage("no regular file")
            if facts.st_size > MAX_FILE_BYTES:
                raise UnreadableImage(f"file of {facts.st_size} bytes")
            data = data.read_bytes()
        except OSError as error:
            raise UnreadableImage(reason(error)) from None
    if not data:
        raise UnreadableImage("empty file")
    return data


def _formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    image_module = pillow()
    image_module.init()
    return [name for name in FORMATS if name in image_module.OPEN]


def to_rgb(image: "Image") -> "Image":
    """Convert an opened image of any mode to 8-bit RGB, upright.

    Raises:
        UnreadableImage: when its mode has no defined range (32-bit floats and integers).
        OSError: when the file turns out to be damaged.
    """
    from PIL import ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _grey_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, "white")
        image = pillow().alpha_composite(white, image)
    return image.convert("RGB")


def to_pixels(image: "Image", size: int) -> Tensor:
    """Bicubic resize of the short side to ``size`` and centre crop: uint8 ``[3, size, size]``.

    The pixels are those of CLIP's image processor: the long side is truncated to whole pixels. For
    a strip, such as 20,000 x 20 pixels, only the crop is resampled; values differ by two at most.
    """
    width, height = image.size
    short, long = min(image.size), max(image.size)
    wide, high = (size * side // short for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    bicubic = pillow().Resampling.BICUBIC
    if long <= STRIP * short:
        whole = image.resize((wide, high), bicubic)
        square = whole.crop((left, top, left + size, top + size))
    else:
        # Rounding may put the far edge a few ulp outside the image.
        right = min(width, (left + size) * width / wide)
        bottom = min(height, (top + size) * height / high)
        box = (left * width / wide, top * height / high, right, bottom)
        square = image.resize((size, size), bicubic, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _grey_to_8_bits(image: "Image") -> "Image":
    # Pillow would clip these at 255, which turns most of a 16-bit image white.
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f"mode {image.mode}: pixel values have no defined range")
    return pillow().fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
