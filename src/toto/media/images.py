"""Images to clips of one frame, by Pillow."""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from toto.media import limits
from toto.media.clip import Clip
from toto.runtime.errors import MediaError

OpenFile = io.BytesIO | io.BufferedReader

# Not what else Pillow opens whatever the ending says: PostScript, which runs a program, and dozens of forgotten ones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "GIF")
GREY_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
PIXELS_IN_BAND = 4_000_000


def read_image(path: Path | OpenFile, *, source: str | None = None) -> Clip:
    """Read an image file, or one in memory; of one with several pictures the first.

    Of at most 100 megapixels; decoding takes up to 8 bytes a pixel.

    Raises:
        MediaError: it can't be read, is damaged, or declares too many pixels.
        ShortMediaError: it is too small to use.
    """
    name = source or str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of a picture's metadata
            with Image.open(path, formats=_formats()) as image:
                limits.require_size(image.height, image.width, limits.MAX_PIXELS, where=name)
                pixels = _to_rgb(image)
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError(f"declares more than {limits.MAX_PIXELS:,} pixels", where=name, fix="scale it down") from None
    except UnidentifiedImageError:
        raise MediaError("not an image that Pillow can read", where=name, fix="convert it to PNG or JPEG") from None
    except Exception as error:  # what Pillow's codecs raise on damaged files has no common kind
        raise MediaError(f"image can't be decoded ({error})", where=name, fix="restore or remove it") from None
    return Clip(
        frames=torch.from_numpy(pixels).unsqueeze(0),
        indices=torch.zeros(1, dtype=torch.int64),
        timestamps=torch.zeros(1, dtype=torch.float64),
        source=name,
    )


def format_of(path: Path | OpenFile) -> str | None:
    """The format of an image ("jpeg"); None where it is none."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return (image.format or "unknown").lower()
    except Exception:  # as in `read_image`
        return None


def declared_size(path: Path | OpenFile) -> tuple[int, int] | None:
    """Width and height as an image's header tells them, before it is turned upright; None where it is no image."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return image.size
    except Exception:  # as in `read_image`
        return None


def is_animated(path: Path | OpenFile) -> bool:
    """Whether an image file holds several frames."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # as in `read_image`
        return False


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """An opened image as uint8 `[H, W, 3]`, upright; worked out in bands of rows, so as to hold few whole copies."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    convert = _band_of_16_bit if image.mode in GREY_16_BIT else _band
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, PIXELS_IN_BAND // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        pixels[top : top + rows] = convert(image if rows >= image.height else image.crop(box))
    return pixels


def _band(band: Image.Image) -> npt.NDArray[np.uint8]:
    if band.has_transparency_data:
        rgba = band.convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(band.convert("RGB"))


def _band_of_16_bit(band: Image.Image) -> npt.NDArray[np.uint8]:
    deep = np.asarray(band).astype(np.int64)
    grey = ((deep.clip(0, 65535) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
