"""Which window lies in which batch slot: a pure function of (seed, step, slot).

Sequence number n = step x batch + slot. Sources take turns in blocks: in a block, each source has exactly its share
of the places, in an order shuffled anew for every block, so the ratios hold exactly over any whole number of blocks.
A source's k-th draw belongs to epoch k // (draws in an epoch) and is shuffled within it:

* video: each item is cut into windows of T frames that don't overlap; the first one's start is drawn anew for every
  epoch and item, so the windows differ from epoch to epoch and each frame counts (nearly) once in each.
* image: T images, the next T of a list of all images that is shuffled anew each time it is through.

Nothing is remembered but n, so training goes on exactly where it was, at any number of ranks or workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from toto.media.sampling import tiling
from toto.runtime.errors import ConfigError, PassportError
from toto.runtime.seed import integer, stream
from toto.tokens.passport import Passport
from toto.tokens.patches import patchify
from toto.tokens.sequence import Modality, pack
from toto.tokens.shards import TokenStore
from toto.training.permutation import permuted

LARGEST_BLOCK = 10_000


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: a folder of shards.
        weight: its share of the sequences, relative to the other sources'.
        modality: video takes windows of the store's videos; image takes groups of its images.
    """

    path: Path
    weight: float
    modality: Modality = "video"


@dataclass(frozen=True, kw_only=True)
class Window:
    """T frames for one sequence, and where they come from: (item, first frame in it) for each run of frames.

    Their pixels are there where patches were asked for.
    """

    codes: Int64[Tensor, "T rows cols"]
    modality: Modality
    source: int
    origin: tuple[tuple[str, int], ...]
    pixels: UInt8[Tensor, "T H W 3"] | None = None


class Source:
    """The windows of one store, addressed by their number; with their pixels where `pixels` is set."""

    def __init__(self, config: SourceConfig, *, frames: int, seed: int, number: int, pixels: bool = False):
        self.config, self.frames, self.number, self.pixels = config, frames, number, pixels
        self.store = TokenStore(config.path)
        if pixels:
            self.store.require_pixels()
        self._seed = integer(seed, "source", number)
        table = self.store.table
        is_kind = np.array([kind == config.modality for kind in table.column("kind").to_pylist()], dtype=bool)
        counts = np.where(is_kind, self.store.column("frame_count"), 0)
        if config.modality == "image":
            self._items = np.flatnonzero(counts)
            self.draws_per_epoch = math.ceil(len(self._items) / frames)
            self.left_out = 0
        else:
            self._windows_before = np.concatenate([[0], np.cumsum(counts // frames)])
            self.draws_per_epoch = int(self._windows_before[-1])
            self.left_out = int((is_kind & (counts < frames)).sum())
        if self.draws_per_epoch == 0:
            raise ConfigError(
                f"holds no {config.modality} of {frames if config.modality == 'video' else 1} frames",
                where=config.path,
                fix="give longer videos, a smaller T, or the other modality",
            )

    def __str__(self) -> str:
        unit = "groups of images" if self.config.modality == "image" else "windows"
        short = f", {self.left_out} videos shorter than {self.frames} frames left out" if self.left_out else ""
        return f"{self.config.path}: {self.draws_per_epoch:,} {unit} of {self.frames} in an epoch{short}"

    def draw(self, number: int) -> Window:
        """The source's `number`-th draw since the beginning of training."""
        return self._images(number) if self.config.modality == "image" else self._video(number)

    def in_order(self, number: int) -> Window:
        """Window `number` of a fixed enumeration, for evaluation: videos from their first frame, images as listed."""
        if self.config.modality == "image":
            return self._group([(number * self.frames + place) % len(self._items) for place in range(self.frames)])
        item, place = self._locate(number)
        return self._window(item, place * self.frames)

    def _video(self, number: int) -> Window:
        epoch, place = divmod(number, self.draws_per_epoch)
        window = permuted(place, self.draws_per_epoch, integer(self._seed, epoch))
        item, place_in_item = self._locate(window)
        _, left_over = tiling(int(self.store.column("frame_count")[item]), self.frames)
        phase = int(stream(self._seed, epoch, item).integers(left_over + 1))
        return self._window(item, phase + place_in_item * self.frames)

    def _images(self, number: int) -> Window:
        chosen = []
        for place in range(number * self.frames, (number + 1) * self.frames):
            epoch, index = divmod(place, len(self._items))
            chosen.append(permuted(index, len(self._items), integer(self._seed, epoch)))
        return self._group(chosen)

    def _locate(self, window: int) -> tuple[int, int]:
        item = int(np.searchsorted(self._windows_before, window, side="right")) - 1
        return item, window - int(self._windows_before[item])

    def _window(self, item: int, start: int) -> Window:
        return self._made([(item, start)], self.frames)

    def _group(self, places: list[int]) -> Window:
        return self._made([(int(self._items[place]), 0) for place in places], 1)

    def _made(self, runs: list[tuple[int, int]], count: int) -> Window:
        """The window of `count` frames from each (item, first frame)."""
        return Window(
            codes=torch.cat([self.store.codes(item, start, count) for item, start in runs]),
            modality=self.config.modality,
            source=self.number,
            origin=tuple((self._name(item), start) for item, start in runs),
            pixels=torch.cat([self.store.pixels(item, start, count) for item, start in runs]) if self.pixels else None,
        )

    def _name(self, item: int) -> str:
        return str(self.store.table.column("id")[item].as_py())


class Mixture:
    """Several sources in fixed ratios, addressed by (step, slot).

    Raises:
        ConfigError: no source, a weight that is not positive, a source without a window, or one without the pixels
            that are asked for.
        PassportError: sources of different tokenizers or grids.
    """

    def __init__(self, sources: tuple[SourceConfig, ...], *, frames: int, seed: int, pixels: bool = False):
        if not sources:
            raise ConfigError("no source to train on", where="data.sources", fix="give at least one shard folder")
        for source in sources:
            if not (math.isfinite(source.weight) and source.weight > 0):
                raise ConfigError(
                    f"weight {source.weight} is not positive", where=source.path, fix="leave the source out"
                )
        self.frames, self.seed = frames, seed
        self.sources = [
            Source(source, frames=frames, seed=seed, number=n, pixels=pixels) for n, source in enumerate(sources)
        ]
        for other in self.sources[1:]:
            self.passport.require_same(
                other.store.passport, where=str(other.config.path), fix="tokenize all sources alike"
            )
        self.shares = block_shares([source.weight for source in sources])

    @property
    def passport(self) -> Passport:
        """The passport of all sources."""
        return self.sources[0].store.passport

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        return self.sources[0].store.grid

    @cached_property
    def stride(self) -> int:
        """The stride at which the videos were tokenized."""
        videos = [source.store.stride for source in self.sources if source.config.modality == "video"]
        if len(set(videos)) > 1:
            raise PassportError(
                f"sources have different strides {sorted(set(videos))}", fix="tokenize all sources alike"
            )
        return videos[0] if videos else 1

    def window(self, number: int) -> Window:
        """The window of sequence `number` = step x batch + slot."""
        source, draw = locate(number, self.shares, self.seed)
        return self.sources[source].draw(draw)

    def windows(self, step: int, batch: int) -> list[Window]:
        """The windows of a whole batch."""
        return [self.window(step * batch + slot) for slot in range(batch)]


def sequences_of(windows: list[Window], frames: int | None = None) -> Int64[Tensor, "B S"]:
    """Windows as sequences of ids; with `frames`, each cut into sequences of so many frames."""
    parts = [window.codes.reshape(-1, frames or len(window.codes), *window.codes.shape[1:]) for window in windows]
    return torch.cat([pack(codes, window.modality) for codes, window in zip(parts, windows, strict=True)])


def patches_of(
    windows: list[Window], frames: int | None = None, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "B N P"] | None:
    """The patches of what `sequences_of` makes of the same windows, on a device; None where there are no pixels."""
    pixels = [window.pixels for window in windows if window.pixels is not None]
    if not pixels:
        return None
    parts = [clip.reshape(-1, frames or len(clip), *clip.shape[1:]) for clip in pixels]
    return patchify(torch.cat(parts).to(device), *windows[0].codes.shape[1:])


def block_shares(weights: list[float]) -> tuple[int, ...]:
    """Places of each source in a block: the smallest whole numbers in the ratio of the weights.

    >>> block_shares([0.2, 0.1, 0.1, 0.6])
    (2, 1, 1, 6)
    """
    parts = [
        Fraction(weight).limit_denominator(1000) / Fraction(sum(weights)).limit_denominator(1000) for weight in weights
    ]
    whole = [int(part * math.lcm(*(part.denominator for part in parts))) for part in parts]
    shares = tuple(count // math.gcd(*whole) for count in whole)
    if 0 in shares or sum(shares) > LARGEST_BLOCK:
        raise ConfigError(f"weights {weights} have no simple ratio", where="data.sources", fix="use rounder weights")
    return shares


def locate(number: int, shares: tuple[int, ...], seed: int) -> tuple[int, int]:
    """Which source sequence `number` comes from, and which draw of that source it is."""
    block, place = divmod(number, sum(shares))
    order = _block_order(block, shares, seed)
    source = order[place]
    return source, block * shares[source] + order[:place].count(source)


@lru_cache(maxsize=16)
def _block_order(block: int, shares: tuple[int, ...], seed: int) -> tuple[int, ...]:
    places = [source for source, share in enumerate(shares) for _ in range(share)]
    return tuple(places[i] for i in stream(seed, "block", block).permutation(len(places)))


def describe(windows: list[Window]) -> list[dict[str, Any]]:
    """Where the windows of a batch come from, for error reports."""
    return [{"source": window.source, "modality": window.modality, "origin": list(window.origin)} for window in windows]
