"""Which window lies in which batch slot: a pure function of (seed, step, slot).

Sequence number n = step x batch + slot. Sources take turns in blocks that hold their ratios exactly (`order`).
A source's k-th draw belongs to epoch k // (draws in an epoch) and is shuffled within it:

* video: each item is cut into windows of T frames that don't overlap; the first one's start is drawn anew for every
  epoch and item, so the windows differ from epoch to epoch and each frame counts (nearly) once in each.
* image: T images, the next T of a list of all images that is shuffled anew each time it is through.

Nothing is remembered but n, so training goes on exactly where it was, at any number of ranks or workers. The order is
worked out for thousands of sequences at once, and frames are copied file by file into one array for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8, UInt16
from torch import Tensor

from toto.runtime.errors import ConfigError, PassportError
from toto.runtime.seed import integer
from toto.tokens.passport import Passport
from toto.tokens.patches import patchify
from toto.tokens.sequence import CODE_OFFSET, END, START, Modality, pack, sequence_length
from toto.tokens.shards import TokenStore, Verify
from toto.training.order import Turns
from toto.training.permutation import Numbers, drawn, permuted

PLANNED_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        path: a folder of shards.
        weight: its share of the sequences, relative to the other sources'; 0 where it joins later.
        modality: video takes windows of the store's videos; image takes groups of its images.
    """

    path: Path
    weight: float
    modality: Modality = "video"


@dataclass(frozen=True, kw_only=True)
class MixtureChange:
    """New weights from a step on.

    Attributes:
        step: the first step with them.
        weights: one for each source, in the order of the sources; 0 leaves a source out.
    """

    step: int
    weights: tuple[float, ...]


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
    """The windows of one store, addressed by their number; with their pixels where `pixels` is set.

    Its draw k is made of runs of frames: one run of T frames of a video, or T runs of one frame, images.
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
    ):
        self.config, self.frames, self.number, self.pixels = config, frames, number, pixels
        self.store = TokenStore(config.path, verify=verify)
        if pixels:
            self.store.require_pixels()
        self._key = integer(seed, "source", number)
        self._first_frames, self._counts = self.store.column("first_frame"), self.store.column("frame_count")
        is_kind = self.store.is_kind(config.modality)
        if config.modality == "image":
            self._items = np.flatnonzero(is_kind & (self._counts > 0))
            self.run_frames = 1
            self.draws_per_epoch = math.ceil(len(self._items) / frames)
            self.left_out = 0
        else:
            windows = np.where(is_kind, self._counts // frames, 0)
            self._windows_before = np.concatenate([[0], np.cumsum(windows)])
            self.run_frames = frames
            self.draws_per_epoch = int(self._windows_before[-1])
            self.left_out = int((is_kind & (self._counts < frames)).sum())
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
        items, starts = self.runs(np.array([number]))
        return self._window(items[0], starts[0])

    def in_order(self, number: int) -> Window:
        """Window `number` of a fixed enumeration, for evaluation: videos from their first frame, images as listed."""
        if self.config.modality == "image":
            items = self._items[(number * self.frames + np.arange(self.frames)) % len(self._items)]
            return self._window(items, np.zeros_like(items))
        item, place = self._locate(np.array([number]))
        return self._window(item, place * self.frames)

    def runs(self, draws: Numbers) -> tuple[Numbers, Numbers]:
        """The runs of frames of each of the draws `[N]`, as item and first frame in it, both `[N, R]`."""
        if self.config.modality == "image":
            epoch, index = np.divmod(draws[:, None] * self.frames + np.arange(self.frames), len(self._items))
            chosen = permuted(index.ravel(), len(self._items), drawn(self._key, epoch.ravel()))
            items = self._items[chosen].reshape(epoch.shape)
            return items, np.zeros_like(items)
        epoch, place = np.divmod(draws, self.draws_per_epoch)
        keys = drawn(self._key, epoch)
        item, place_in_item = self._locate(permuted(place, self.draws_per_epoch, keys))
        left_over = self._counts[item] % self.frames
        phase = (drawn(keys, item) % (left_over + 1).astype(np.uint64)).astype(np.int64)
        return item[:, None], (phase + place_in_item * self.frames)[:, None]

    def first_frames(self, draws: Numbers) -> Numbers:
        """The first frame of each run of the draws, counted over the store's files, `[N, R]`."""
        items, starts = self.runs(draws)
        return self._first_frames[items] + starts

    def origin(self, draw: int) -> tuple[tuple[str, int], ...]:
        """Where a draw comes from: (item's id, first frame in it) for each run of frames."""
        items, starts = self.runs(np.array([draw]))
        return self._origin(items[0], starts[0])

    def _locate(self, windows: Numbers) -> tuple[Numbers, Numbers]:
        items = np.searchsorted(self._windows_before, windows, side="right") - 1
        return items, windows - self._windows_before[items]

    def _window(self, items: Numbers, starts: Numbers) -> Window:
        """The window of these runs."""
        runs = list(zip(items.tolist(), starts.tolist(), strict=True))
        pixels = [self.store.pixels(item, start, self.run_frames) for item, start in runs] if self.pixels else None
        return Window(
            codes=torch.cat([self.store.codes(item, start, self.run_frames) for item, start in runs]),
            modality=self.config.modality,
            source=self.number,
            origin=self._origin(items, starts),
            pixels=torch.cat(pixels) if pixels else None,
        )

    def _origin(self, items: Numbers, starts: Numbers) -> tuple[tuple[str, int], ...]:
        names = self.store.table.column("id")
        return tuple(
            (str(names[item].as_py()), start) for item, start in zip(items.tolist(), starts.tolist(), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The windows of a step, or of some of its slots, as the shards hold them.

    Attributes:
        mixture: they come from.
        source: the number of each window's source.
        draw: which draw of its source each window is.
        codes: of all windows.
        pixels: of all windows, where patches were asked for.
    """

    mixture: Mixture
    source: Int64[np.ndarray, " B"]
    draw: Int64[np.ndarray, " B"]
    codes: UInt16[np.ndarray, "B T rows cols"]
    pixels: UInt8[np.ndarray, "B T H W 3"] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def sequences(self, frames: int | None = None, *, pinned: bool = False) -> Int64[Tensor, "B S"]:
        """The windows as sequences of ids; with `frames`, each cut into sequences of so many frames.

        Args:
            frames: of a sequence; must divide T. None takes the whole window.
            pinned: in page-locked memory, from which a GPU can copy while it computes.
        """
        _, T, rows, cols = self.codes.shape
        cut = T // (frames or T)
        shape = len(self) * cut, sequence_length(T // cut, rows, cols)
        made = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        ids = made.numpy()
        ids[:, 0] = np.repeat(self.mixture.start_ids[self.source], cut)
        ids[:, 1:-1] = self.codes.reshape(len(ids), -1)
        ids[:, 1:-1] += CODE_OFFSET  # twice as fast as one np.add, which converts through a buffer
        ids[:, -1] = END
        return made

    def patches(
        self, frames: int | None = None, *, part: slice = slice(None), device: torch.device | str = "cpu"
    ) -> Float[Tensor, "B N P"] | None:
        """The patches of what `sequences` makes of a part of the windows, on a device; None without pixels."""
        if self.pixels is None:
            return None
        clips = torch.from_numpy(self.pixels[part]).to(device)
        return patchify(clips.reshape(-1, frames or clips.shape[1], *clips.shape[2:]), *self.codes.shape[2:])

    def windows(self) -> list[Window]:
        """The windows one by one, with the names of their items."""
        sources = [self.mixture.sources[number] for number in self.source]
        return [
            Window(
                codes=torch.from_numpy(self.codes[slot].astype(np.int64)),
                modality=source.config.modality,
                source=source.number,
                origin=source.origin(int(self.draw[slot])),
                pixels=None if self.pixels is None else torch.from_numpy(self.pixels[slot]),
            )
            for slot, source in enumerate(sources)
        ]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where the windows of some sequences lie.

    Attributes:
        source: of each sequence.
        draw: of each sequence.
        firsts: of each source, the first frames of its draws' runs.
        row: of each sequence, its row in the `firsts` of its source.
    """

    source: Numbers
    draw: Numbers
    firsts: list[Numbers]
    row: Numbers


class Mixture:
    """Several sources in exact ratios, addressed by (step, slot).

    Args:
        sources: with their weights in the beginning.
        frames: T, frames in a window.
        seed: of the order.
        pixels: read the frames' pixels too.
        changes: (sequence, weights of all sources): from this sequence number on, other weights.
        verify: "read" compares every file with its checksum before anything of it is used.

    Raises:
        ConfigError: no source, a weight below 0, a source whose weight is always 0, one without a window, or one
            without the pixels that are asked for.
        PassportError: sources of different tokenizers or grids.
    """

    def __init__(
        self,
        sources: tuple[SourceConfig, ...],
        *,
        frames: int,
        seed: int,
        pixels: bool = False,
        changes: Sequence[tuple[int, tuple[float, ...]]] = (),
        verify: Verify = "never",
    ):
        if not sources:
            raise ConfigError("no source to train on", where="data.sources", fix="give at least one shard folder")
        phases = [(0, tuple(source.weight for source in sources)), *changes]
        for number, source in enumerate(sources):
            weights = [weights[number] for _, weights in phases]
            if bad := [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]:
                raise ConfigError(f"weight {bad[0]} is not positive", where=source.path, fix="leave the source out")
            if not any(weights):
                raise ConfigError("weight 0.0 is not positive", where=source.path, fix="leave the source out")
        self.frames, self.seed = frames, seed
        self._turns = Turns(phases, seed=seed)
        self.sources = [
            Source(source, frames=frames, seed=seed, number=n, pixels=pixels, verify=verify)
            for n, source in enumerate(sources)
        ]
        for other in self.sources[1:]:
            self.passport.require_same(
                other.store.passport, where=str(other.config.path), fix="tokenize all sources alike"
            )
        self.start_ids = np.array([START[source.config.modality] for source in self.sources])
        self._planned: tuple[tuple[int, int], _Plan] | None = None

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

    def batch(self, step: int, batch: int, *, slots: slice = slice(None)) -> Batch:
        """The windows of a step, or of some slots of it.

        Args:
            step: counted from 0.
            batch: sequences in a step.
            slots: `slice(rank, None, world)` is what one of several processes reads.
        """
        steps = max(1, PLANNED_AT_ONCE // batch)
        plan = self._plan(step // steps * steps * batch, steps * batch)
        first = step % steps * batch
        chosen = np.arange(first, first + batch)[slots]
        source = plan.source[chosen]
        return Batch(
            mixture=self,
            source=source,
            draw=plan.draw[chosen],
            codes=self._read(source, plan, chosen),
            pixels=self._read(source, plan, chosen, pixels=True) if self.sources[0].pixels else None,
        )

    def windows(self, step: int, batch: int) -> list[Window]:
        """The windows of a whole batch, one by one."""
        return self.batch(step, batch).windows()

    def _plan(self, first: int, count: int) -> _Plan:
        """Where `count` sequences lie; the last plan is kept, since steps come one after another."""
        if self._planned and self._planned[0] == (first, count):
            return self._planned[1]
        source, draw = self._turns.locate(np.arange(first, first + count))
        row, firsts = np.empty_like(source), []
        for each in self.sources:
            mine = np.flatnonzero(source == each.number)
            row[mine] = np.arange(len(mine))
            firsts.append(each.first_frames(draw[mine]))
        plan = _Plan(source=source, draw=draw, firsts=firsts, row=row)
        self._planned = (first, count), plan
        return plan

    def _read(self, source: Numbers, plan: _Plan, chosen: Numbers, *, pixels: bool = False) -> Any:
        """Codes `[B, T, rows, cols]`, or pixels `[B, T, H, W, 3]`, of some planned sequences."""
        shape = (*self.passport.frame_size, 3) if pixels and self.passport.frame_size else self.grid
        out = np.empty((len(chosen), self.frames, *shape), np.uint8 if pixels else np.uint16)
        for each in self.sources:
            slots = np.flatnonzero(source == each.number)
            if len(slots):
                firsts = plan.firsts[each.number][plan.row[chosen[slots]]]
                runs = firsts.shape[1]
                alone = len(slots) == len(chosen)
                places = None if alone else (slots[:, None] * runs + np.arange(runs)).ravel()
                into = out.reshape(-1, each.run_frames, *shape)
                each.store.read_runs(firsts.ravel(), each.run_frames, into, places, pixels=pixels)
        return out


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


def describe(windows: list[Window]) -> list[dict[str, Any]]:
    """Where the windows of a batch come from, for error reports."""
    return [{"source": window.source, "modality": window.modality, "origin": list(window.origin)} for window in windows]
