"""Pixels that a tokenizer is trained on and held against: whole frames in memory, crops drawn by (seed, step)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from toto.media import sample
from toto.media.catalog import list_source
from toto.media.decode import media_kind, read_media
from toto.media.transforms import apply_crop, crop_box, resize, square
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.progress import say
from toto.runtime.seed import stream
from toto.tokens.neural import to_pixels

SAMPLE = "sample:"
MEMORY = 2 * 10**9  # bytes of frames in memory after which images are read when they are drawn
VIDEO_ROOM = 8  # as many times that for videos, which always stay in memory


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where frames come from.

    Attributes:
        name: as metrics call it ("scenes").
        where: a folder of videos and images, or a part of the embedded sample such as "sample:scenes/train".
        stride: every `stride`-th frame of a video is taken.
        share: this source's share of the crops (relative to the others); not used for held-out frames.
    """

    name: str
    where: str
    stride: int
    share: float


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """What is cut out of a frame, and how it is changed.

    Attributes:
        size: side of the crops in pixels.
        zoom: the least share of the frame's shorter side that a crop covers before it is resized, but never fewer
            pixels than `size` where the frame has them; the most is the whole shorter side.
        native: share of the crops that are cut out at the frame's own scale (frames of at most twice `size` only).
        colour_share: share of the crops whose colours are changed.
        colour_mix: standard deviation of the change of the 3 x 3 colour matrix.
        colour_shift: standard deviation of the change of the channels' level, where black is -1 and white is 1.
    """

    size: int
    zoom: float
    native: float
    colour_share: float
    colour_mix: float
    colour_shift: float


def files_of(source: Source) -> list[Path]:
    """The media files of a source in a fixed order; see `toto.media.catalog.list_source` for the errors."""
    embedded = source.where.startswith(SAMPLE)
    folder = sample.sample_folder() / source.where.removeprefix(SAMPLE) if embedded else Path(source.where)
    return [item.path for item in list_source(folder).items]


Loaded = UInt8[Tensor, "T H W 3"] | Path  # the frames of a file, or an image that is read when it is drawn


def load(source: Source, *, room: int = MEMORY) -> list[Loaded]:
    """Frames of a source, a tensor a file; once they fill `room` bytes, images are left on disk.

    Files that can't be read are left out and counted aloud.

    Raises:
        ConfigError: there is nothing to read, or nothing can be read, or the videos don't fit into memory.
    """
    found: list[Loaded] = []
    failed: list[MediaError] = []
    used, files = 0, files_of(source)
    for path in files:
        if used > room and media_kind(path) == "image":
            found.append(path)
            continue
        try:
            frames = read_media(path, stride=source.stride).frames
        except MediaError as error:
            failed.append(error)
            continue
        used += frames.numel()
        if used > VIDEO_ROOM * room:
            raise ConfigError(
                f"its frames need more than {VIDEO_ROOM * room / 1e9:.0f} GB of memory",
                where=source.where,
                fix="raise the source's stride, or store the frames as images",
            )
        found.append(frames)
    if failed:
        say(f"{source.name}: {len(failed)} of {len(files)} files can't be read; the first: {failed[0]}")
    if not found:
        raise ConfigError(f"nothing could be read (the first: {failed[0].what})", where=source.where)
    return found


def frames_of(loaded: Loaded) -> UInt8[Tensor, "T H W 3"]:
    """The frames, read now where they lie on disk."""
    return read_media(loaded).frames if isinstance(loaded, Path) else loaded


def load_squares(source: Source, size: int) -> UInt8[Tensor, "T size size 3"]:
    """Held-out frames: shorter side to `size`, then the square in the centre."""
    return torch.cat([square(frames_of(loaded), size) for loaded in load(source)])


@final
class Crops:
    """Draws training batches; the batch of a step depends on the seed and the step alone."""

    def __init__(self, sources: tuple[Source, ...], seed: int):
        self.seed = seed
        self.clips = [load(source) for source in sources]
        self.ends = [
            list(accumulate(1 if isinstance(loaded, Path) else len(loaded) for loaded in clips)) for clips in self.clips
        ]
        total = sum(source.share for source in sources)
        self.shares = [source.share / total for source in sources]

    @property
    def frames(self) -> int:
        """How many different frames there are."""
        return sum(ends[-1] for ends in self.ends)

    def batch(self, step: int, count: int, config: CropConfig) -> Float[Tensor, "B 3 size size"]:
        """Pixels in [-1, 1]."""
        rng = stream(self.seed, "crops", step)
        crops = torch.cat([self._crop(rng, config) for _ in range(count)])
        return change_colours(to_pixels(crops), config, rng)

    def _crop(self, rng: np.random.Generator, config: CropConfig) -> UInt8[Tensor, "1 size size 3"]:
        source = int(rng.choice(len(self.clips), p=self.shares))
        number = int(rng.integers(self.ends[source][-1]))
        clip = bisect_right(self.ends[source], number)
        frames = frames_of(self.clips[source][clip])
        frame = frames[number - self.ends[source][clip]].unsqueeze(0)
        shorter = min(frame.shape[1:3])
        least = min(shorter, max(config.size, round(config.zoom * shorter)))
        side = int(rng.integers(least, shorter + 1))
        if rng.random() < config.native and shorter <= 2 * config.size:
            side = least
        box = crop_box(frame.shape[1], frame.shape[2], side, "random", rng)
        crop = resize(apply_crop(frame, box), config.size, config.size)
        return crop.flip(2) if rng.random() < 0.5 else crop


def change_colours(
    pixels: Float[Tensor, "B 3 H W"], config: CropConfig, rng: np.random.Generator
) -> Float[Tensor, "B 3 H W"]:
    """Mix and shift the channels of some of the crops, each in its own way."""
    count = len(pixels)
    changed = torch.from_numpy(rng.random(count) < config.colour_share).float()
    mix = torch.from_numpy(rng.normal(0, config.colour_mix, (count, 3, 3))).float() * changed[:, None, None]
    shift = torch.from_numpy(rng.normal(0, config.colour_shift, (count, 3))).float() * changed[:, None]
    out = torch.einsum("bij,bjhw->bihw", mix + torch.eye(3), pixels) + shift[:, :, None, None]
    return out.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
