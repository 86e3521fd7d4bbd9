"""Pixels that a tokenizer is trained on and held against: whole frames in memory, crops drawn by (seed, step)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from toto.media import sample
from toto.media.catalog import Catalog, Item, units
from toto.media.catalogs import open_source
from toto.media.ledger import LedgerRow
from toto.media.reading import read_item, stream_unit
from toto.media.transforms import apply_crop, crop_box, resize, square
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.places import AnyPath
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
        where: videos and images in any form that `toto.media.catalogs` reads, or a part of the embedded sample such as
            "sample:scenes/train".
        stride: every `stride`-th frame of a video is taken.
        share: this source's share of the crops (relative to the others); not used for held-out frames.
        clips: the folder that holds what a manifest names; None is the manifest's own.
        split: only items of this split.
        image_column: of parquet files, the column with the bytes; None is one with a usual name.
    """

    name: str
    where: str
    stride: int
    share: float
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None


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


Loaded = UInt8[Tensor, "_ _ _ 3"] | Item  # the frames of an item, or an image that is read when it is drawn


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What was read of a source.

    Attributes:
        items: what can be drawn from, in the source's order.
        ledger: a row for every input that was offered.
    """

    items: list[Loaded]
    ledger: tuple[LedgerRow, ...]


def catalog_of(source: Source) -> Catalog:
    """What a source offers; see `toto.media.catalogs.open_source` for the errors."""
    embedded = source.where.startswith(SAMPLE)
    where = str(sample.sample_folder() / source.where.removeprefix(SAMPLE)) if embedded else source.where
    return open_source(where, clips=source.clips, split=source.split, image_column=source.image_column)


def load(source: Source, *, room: int = MEMORY) -> Loading:
    """Frames of a source; once they fill `room` bytes, images are left on disk.

    Items that can't be read are left out and counted aloud.

    Raises:
        ConfigError: there is nothing to read, or nothing can be read, or the videos don't fit into memory.
    """
    found: list[Loaded] = []
    rows: list[LedgerRow] = []
    catalog, used = catalog_of(source), 0
    for unit in units(catalog.items):
        if used > room and unit[0].kind == "image":
            found.append(unit[0])
            rows.append(LedgerRow(id=unit[0].id, kind="image", status="ok", reason="read when it is drawn", frames=1))
            continue
        for item, frames in zip(unit, _read_unit(unit, source.stride), strict=True):
            if isinstance(frames, MediaError):
                rows.append(LedgerRow(id=item.id, kind=item.kind, status=frames.status, reason=frames.what))
                continue
            used += frames.numel()
            if used > VIDEO_ROOM * room:
                raise ConfigError(
                    f"its frames need more than {VIDEO_ROOM * room / 1e9:.0f} GB of memory",
                    where=source.where,
                    fix="raise the source's stride, or store the frames as images",
                )
            found.append(frames)
            rows.append(LedgerRow(id=item.id, kind=item.kind, status="ok", frames=len(frames)))
    failed = [row for row in rows if row.status != "ok"]
    if failed:
        first = f"{failed[0].id}: {failed[0].reason}"
        say(f"{source.name}: {len(failed)} of {len(catalog.items)} items can't be read; the first: {first}")
    if not found:
        raise ConfigError(f"nothing could be read (the first: {failed[0].reason})", where=source.where)
    return Loading(items=found, ledger=(*rows, *catalog.skipped))


def _read_unit(unit: tuple[Item, ...], stride: int) -> list[UInt8[Tensor, "_ _ _ 3"] | MediaError]:
    """The frames of an item, or of the windows of one video in one pass over it."""
    if len(unit) == 1:
        try:
            return [read_item(unit[0], stride=stride).frames]
        except MediaError as error:
            return [error]
    clips: list[list[Tensor]] = [[] for _ in unit]
    wrong: dict[int, MediaError] = {}
    for place, clip in stream_unit(unit, stride=stride, offsets=[0] * len(unit)):
        if isinstance(clip, MediaError):
            wrong.setdefault(place, clip)
        else:
            clips[place].append(clip.frames)
    return [wrong.get(place) or torch.cat(parts) for place, parts in enumerate(clips)]


def frames_of(loaded: Loaded) -> UInt8[Tensor, "T H W 3"]:
    """The frames, read now where they lie on disk."""
    return read_item(loaded).frames if isinstance(loaded, Item) else loaded


def load_squares(source: Source, size: int) -> tuple[UInt8[Tensor, "T size size 3"], tuple[LedgerRow, ...]]:
    """Held-out frames (shorter side to `size`, then the square in the centre), and a row for every input."""
    loading = load(source)
    return torch.cat([square(frames_of(loaded), size) for loaded in loading.items]), loading.ledger


@final
class Crops:
    """Draws training batches; the batch of a step depends on the seed and the step alone.

    Attributes:
        ledger: for each source, a row for every input.
    """

    def __init__(self, sources: tuple[Source, ...], seed: int):
        self.seed = seed
        loadings = [load(source) for source in sources]
        self.ledger = {source.name: loading.ledger for source, loading in zip(sources, loadings, strict=True)}
        self.clips = [loading.items for loading in loadings]
        self.ends = [
            list(accumulate(1 if isinstance(loaded, Item) else len(loaded) for loaded in clips)) for clips in self.clips
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
