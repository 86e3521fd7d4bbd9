"""Pixels as a Hugging Face vision model wants them, by its `preprocessor_config.json`; no processor's code is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from toto.media.transforms import Filter, crop_box, resized_crop
from toto.runtime.errors import ConfigError
from toto.runtime.files import read_json

FILES: Final = ("preprocessor_config.json", "video_preprocessor_config.json")
FILTERS: Final[dict[int, Filter]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
FIX: Final = "use a model whose frames are resized, cropped to a square, rescaled and normalised"


@dataclass(frozen=True, kw_only=True)
class Preprocessor:
    """Resize, crop in the centre, rescale, normalise.

    Attributes:
        shortest: the shortest side after resizing; None resizes to `size` x `size`, whatever the shape was.
        size: height and width of what the model sees.
        filter: of resizing.
        scale: what a byte is multiplied by.
        mean: of each channel, taken out afterwards.
        deviation: of each channel, divided by then.
    """

    shortest: int | None
    size: int
    filter: Filter
    scale: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def prepare(self, frames: UInt8[Tensor, "T H W 3"]) -> UInt8[Tensor, "T S S 3"]:
        """Resize and crop; the longer side is rounded down, as transformers does."""
        height = width = self.size
        if self.shortest is not None:
            short, long = sorted(frames.shape[1:3])
            longest = int(self.shortest * long / short)
            height, width = (self.shortest, longest) if frames.shape[1] == short else (longest, self.shortest)
        return resized_crop(frames, height, width, crop_box(height, width, self.size, "centre"), self.filter)

    def normalise(self, frames: UInt8[Tensor, "*lead S S 3"]) -> Float[Tensor, "*lead 3 S S"]:
        """Prepared frames as numbers, channels first."""
        mean, deviation = (torch.tensor(each, device=frames.device) for each in (self.mean, self.deviation))
        return ((frames.float() * self.scale - mean) / deviation).movedim(-1, -3)


def read_preprocessor(folder: Path) -> Preprocessor:
    """What a model's folder says about its pixels.

    Raises:
        ConfigError: it says nothing, or asks for what isn't done here.
    """
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        fix = "save its image processor beside it"
        raise ConfigError(f"no {FILES[0]}: nobody knows the size and scale of its pixels", where=folder, fix=fix)
    plain = read_json(path, what="preprocessor configuration")
    try:
        return _of_plain(plain, path)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        what = f"a preprocessor that isn't understood ({type(error).__name__}: {error})"
        raise ConfigError(what, where=path, fix=FIX) from None


def _of_plain(plain: Mapping[str, Any], path: Path) -> Preprocessor:
    crops, size = plain.get("do_center_crop", False), plain["size"]
    if isinstance(size, int):  # as older files have it
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    shortest = size.get("shortest_edge")
    height, width = (shortest, shortest) if shortest else (size["height"], size["width"])
    if crops:
        crop = plain["crop_size"]
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        cut = crop["height"], crop["width"]
        if not shortest and cut != (height, width):
            raise ConfigError(f"resizes to {height} x {width}, then crops {cut[0]} x {cut[1]}", where=path, fix=FIX)
        height, width = cut
    resample = plain.get("resample", 2)
    wrong = next(
        (
            what
            for what, found in {
                f"frames of {height} x {width}, no square": height != width,
                f"a crop of {height} out of {shortest} pixels": bool(shortest) and height > shortest,
                f"resampling number {resample}": resample not in FILTERS,
                "no resizing": not plain.get("do_resize", True),
            }.items()
            if found
        ),
        None,
    )
    if wrong:
        raise ConfigError(f"asks for {wrong}", where=path, fix=FIX)
    normalises = plain.get("do_normalize", True)
    return Preprocessor(
        shortest=None if shortest is None else int(shortest),
        size=int(height),
        filter=FILTERS[resample],
        scale=float(plain.get("rescale_factor", 1 / 255)) if plain.get("do_rescale", True) else 1.0,
        mean=_channels(plain["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        deviation=_channels(plain["image_std"]) if normalises else (1.0, 1.0, 1.0),
    )


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
