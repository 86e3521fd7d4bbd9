"""Pixels before quantisation: shortest side to R, then an R x R crop, the same for all frames of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from toto.media.limits import MAX_PIXELS
from toto.runtime.errors import MediaError

Crop = Literal["centre", "random"]
Filter = Literal["bicubic", "bilinear"]
RESIZED_AT_ONCE = 16_000_000  # pixels


@dataclass(frozen=True, kw_only=True)
class Box:
    """A crop: rows `top .. top + height - 1` and columns `left .. left + width - 1`."""

    top: int
    left: int
    height: int
    width: int


def shortest_side_to(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the shorter side became `size`; the longer one is rounded to the nearest pixel.

    >>> shortest_side_to(720, 1280, 128)
    (128, 228)
    """
    if height <= width:
        return size, max(size, (2 * width * size + height) // (2 * height))
    return max(size, (2 * height * size + width) // (2 * width)), size


def resize(
    frames: UInt8[Tensor, "T H W 3"], height: int, width: int, filter: Filter = "bicubic"
) -> UInt8[Tensor, "T h w 3"]:
    """Resize by antialiased interpolation, equal to Pillow's within one level."""
    if frames.shape[1:3] == (height, width):
        return frames
    planes = frames.permute(0, 3, 1, 2)
    out = F.interpolate(planes, size=(height, width), mode=filter, antialias=True)
    return out.permute(0, 2, 3, 1).contiguous()


def crop_box(height: int, width: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> Box:
    """A `size` x `size` box inside a frame: in the centre, or anywhere with equal chance.

    The centre is rounded towards the top left, `(height - size) // 2`.
    """
    if crop == "centre":
        return Box(top=(height - size) // 2, left=(width - size) // 2, height=size, width=size)
    if rng is None:
        raise ValueError("a random crop needs a generator")
    top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
    return Box(top=top, left=left, height=size, width=size)


def apply_crop(frames: UInt8[Tensor, "T H W 3"], box: Box) -> UInt8[Tensor, "T h w 3"]:
    """Cut the same box out of every frame."""
    return frames[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resized_crop(
    frames: UInt8[Tensor, "T H W 3"], height: int, width: int, box: Box, filter: Filter = "bicubic"
) -> UInt8[Tensor, "T h w 3"]:
    """What `apply_crop(resize(frames, height, width, filter), box)` gives, made of a few frames at a time.

    Raises:
        MediaError: resized, a frame is far larger than the crop, as of a picture that is long and narrow.
    """
    if height * width > MAX_PIXELS:
        what = f"too long and narrow: {width} x {height} pixels once resized, the limit is {MAX_PIXELS:,}"
        raise MediaError(what, fix="crop it")
    parts = torch.split(frames, max(1, RESIZED_AT_ONCE // (height * width)))
    crops = [apply_crop(resize(part, height, width, filter), box).contiguous() for part in parts]
    return crops[0] if len(crops) == 1 else torch.cat(crops)


def square(
    frames: UInt8[Tensor, "T H W 3"], size: int, crop: Crop = "centre", rng: np.random.Generator | None = None
) -> UInt8[Tensor, "T size size 3"]:
    """Shortest side to `size`, then one `size` x `size` crop for all frames; for errors see `resized_crop`."""
    height, width = shortest_side_to(frames.shape[1], frames.shape[2], size)
    box = crop_box(height, width, size, crop, rng)
    return resized_crop(frames, height, width, box)
