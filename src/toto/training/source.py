"""One source of a mixture: the windows of a store, in an order that is shuffled anew for every epoch.

A source's k-th draw belongs to epoch k // (draws in an epoch):

* video: each item is cut into windows of T frames that don't overlap; the first one's start is drawn anew for every
  epoch and item, so the windows differ from epoch to epoch and each frame counts (nearly) once in each.
* image: T images, the next T of a list of all images that is shuffled anew each time it is through.

Of a store that was made online, an item's first frame below the stride and its crop are drawn with them; of one with
several views of each item, all are in an epoch, or one in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.runtime.places import AnyPath
from toto.runtime.seed import integer
from toto.tokens.accounts import is_split, rows_of_inputs
from toto.tokens.online import Encoders, OnlineStore, Pieces
from toto.tokens.sequence import Modality
from toto.tokens.shards import TokenStore, Verify
from toto.training.permutation import Numbers, drawn, permuted

Views = Literal["all", "in-turn"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: a folder of shards.
        weight: its share of the sequences, which is its share of the tokens, relative to the other sources'; 0 where it
            joins later.
        modality: video takes windows of the store's videos; image takes groups of its images.
    """

    path: AnyPath
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
    """The windows of one store, or of one split of it, addressed by their number; with pixels where `pixels` is set.

    Its draw k is made of runs of frames: one run of T frames of a video, or T runs of one frame, images.

    Args:
        config: which store.
        frames: T.
        seed: of the order.
        number: of the source in its mixture.
        pixels: read the frames' pixels too.
        verify: see `TokenStore`.
        split: only items of this split.
        views: "in-turn" gives every input one of its views in an epoch: the (epoch mod K)-th of K.
        encoders: that make the codes of a store without any; by default this process does.
    """

    def __init__(
        self,
        config: SourceConfig,
        *,
        frames: int,
        seed: int,
        number: int,
        pixels: bool = False,
        verify: Verify = "never",
        split: str | None = None,
        views: Views = "all",
        encoders: Encoders | None = None,
    ):
        self.config, self.frames, self.number, self.pixels = config, frames, number, pixels
        self.store = TokenStore(config.path, verify=verify)
        self.online = OnlineStore(self.store, encoders or Encoders()) if self.store.is_online else None
        if pixels and not self.online:
            self.store.require_pixels()
        self._key = integer(seed, "source", number)
        self._first_frames, self._counts = self.store.column("first_frame"), self.store.column("frame_count")
        self._views = _ViewsInTurn(self.store) if views == "in-turn" else None
        inputs = len(self.store) if self._views is None else len(self._views)
        first_views = self._views_at(np.arange(inputs), np.zeros(inputs, np.int64))
        is_kind = self.store.is_kind(config.modality)
        if split is not None:
            is_kind = is_kind & is_split(self.store, split)
        is_kind = is_kind[first_views]
        counts = self._counts if self._views is None else self._views.least(self._counts)
        if config.modality == "image":
            self._inputs = np.flatnonzero(is_kind & (counts > 0))
            self.run_frames = 1
            self.draws_per_epoch = math.ceil(len(self._inputs) / frames)
            self.left_out = 0
        else:
            windows = np.where(is_kind, counts // frames, 0)
            self._windows_before = np.concatenate([[0], np.cumsum(windows)])
            self.run_frames = frames
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
        made = ", encoded as they are read" if self.online else ""
        return f"{self.config.path}: {self.draws_per_epoch:,} {unit} of {self.frames} in an epoch{short}{made}"

    def draw(self, number: int) -> Window:
        """The source's `number`-th draw since the beginning of training."""
        return self._window(self.runs(np.array([number])))

    def in_order(self, number: int) -> Window:
        """Window `number` of a fixed enumeration, for evaluation: videos from their first frame, images as listed.

        Of several views it takes the first; what is encoded as it is read is cropped in the centre.
        """
        first = np.zeros(1, np.int64)
        if self.config.modality == "image":
            inputs = self._inputs[(number * self.frames + np.arange(self.frames)) % len(self._inputs)]
            items = self._views_at(inputs, np.zeros_like(inputs))[None]
            return self._window(Pieces(items=items, starts=np.zeros_like(items)))
        one, place = self._locate(np.array([number]))
        return self._window(Pieces(items=self._views_at(one, first)[None], starts=(place * self.frames)[None]))

    def runs(self, draws: Numbers) -> Pieces:
        """The runs of frames of each of the draws `[N]`, `[N, R]`."""
        if self.config.modality == "image":
            epoch, index = np.divmod(draws[:, None] * self.frames + np.arange(self.frames), len(self._inputs))
            keys = drawn(self._key, epoch.ravel())
            chosen = self._inputs[permuted(index.ravel(), len(self._inputs), keys)]
            items = self._views_at(chosen, epoch.ravel())
            crops = drawn(keys, items, np.array([2])).reshape(epoch.shape) if self.online else None
            return Pieces(items=items.reshape(epoch.shape), starts=np.zeros_like(epoch), crops=crops)
        epoch, place = np.divmod(draws, self.draws_per_epoch)
        keys = drawn(self._key, epoch)
        chosen, place_in_item = self._locate(permuted(place, self.draws_per_epoch, keys))
        items = self._views_at(chosen, epoch)
        windows = self._windows_before[chosen + 1] - self._windows_before[chosen]
        left_over = self._counts[items] - windows * self.frames
        offsets = crops = None
        if self.online:  # a later first frame may cost the last one
            offset = (drawn(keys, items, np.array([1])) % np.uint64(self.store.stride)).astype(np.int64)
            offset[left_over == 0] = 0
            left_over = left_over - (offset > 0)
            offsets, crops = offset[:, None], drawn(keys, items, np.array([2]))[:, None]
        phase = (drawn(keys, items) % (left_over + 1).astype(np.uint64)).astype(np.int64)
        starts = (phase + place_in_item * self.frames)[:, None]
        return Pieces(items=items[:, None], starts=starts, offsets=offsets, crops=crops)

    def first_frames(self, draws: Numbers) -> Numbers:
        """The first frame of each run of the draws, counted over the store's files, `[N, R]`."""
        return self._frames_at(self.runs(draws))

    def read(self, runs: Pieces, codes: Any, pixels: Any | None, places: Numbers | None) -> None:
        """Copy or make the frames of runs `[N]` of draws.

        Args:
            runs: what to read, `[N, R]`.
            codes: uint16 `[M, frames of a run, rows, cols]`, that they go to.
            pixels: uint8 `[M, frames of a run, H, W, 3]`, likewise; None where nobody wants them.
            places: where in `codes` and `pixels` each run goes, `[N x R]`; None puts them one after another.
        """
        if self.online:
            self.online.read(runs, self.run_frames, codes, pixels, places)
            return
        firsts = self._frames_at(runs).ravel()
        self.store.read_runs(firsts, self.run_frames, codes, places)
        if pixels is not None:
            self.store.read_runs(firsts, self.run_frames, pixels, places, pixels=True)

    def origin(self, draw: int) -> tuple[tuple[str, int], ...]:
        """Where a draw comes from: (item's id, first frame in it) for each run of frames."""
        return self._origin(self.runs(np.array([draw])))

    def _frames_at(self, runs: Pieces) -> Numbers:
        firsts: Numbers = self._first_frames[runs.items] + runs.starts
        return firsts

    def _views_at(self, inputs: Numbers, epochs: Numbers) -> Numbers:
        """The item that each input is in an epoch."""
        return inputs if self._views is None else self._views.at(inputs, epochs)

    def _locate(self, windows: Numbers) -> tuple[Numbers, Numbers]:
        inputs = np.searchsorted(self._windows_before, windows, side="right") - 1
        return inputs, windows - self._windows_before[inputs]

    def _window(self, runs: Pieces) -> Window:
        """The window of one draw's runs `[1, R]`."""
        passport = self.store.passport
        codes = np.empty((runs.items.size, self.run_frames, *self.store.grid), np.uint16)
        pixels = None
        if self.pixels:
            assert passport.frame_size is not None
            pixels = np.empty((runs.items.size, self.run_frames, *passport.frame_size, 3), np.uint8)
        self.read(runs, codes, pixels, None)
        return Window(
            codes=torch.from_numpy(codes.reshape(-1, *codes.shape[2:]).astype(np.int64)),
            modality=self.config.modality,
            source=self.number,
            origin=self._origin(runs),
            pixels=None if pixels is None else torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:])),
        )

    def _origin(self, runs: Pieces) -> tuple[tuple[str, int], ...]:
        names = self.store.table.column("id")
        pairs = zip(runs.items[0].tolist(), runs.starts[0].tolist(), strict=True)
        return tuple((str(names[item].as_py()), start) for item, start in pairs)


class _ViewsInTurn:
    """The inputs of a store, each of them one of its views at a time."""

    def __init__(self, store: TokenStore):
        inputs = rows_of_inputs(store)
        self._rows = np.argsort(inputs, kind="stable")  # views of an input follow each other in the table
        self._begin = np.searchsorted(inputs[self._rows], np.arange(inputs.max() + 1))
        self._count = np.diff(self._begin, append=len(inputs))

    def __len__(self) -> int:
        return len(self._begin)

    def at(self, inputs: Numbers, epochs: Numbers) -> Numbers:
        """The row of each input's view in an epoch."""
        rows: Numbers = self._rows[self._begin[inputs] + epochs % self._count[inputs]]
        return rows

    def least(self, counts: Numbers) -> Numbers:
        """The smallest count of each input's views."""
        least: Numbers = np.minimum.reduceat(counts[self._rows], self._begin)
        return least
