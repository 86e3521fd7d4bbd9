"""Which window lies in which batch slot: a pure function of (seed, step, slot).

Sequence number n = step x batch + slot. Sources take turns in blocks that hold their ratios exactly (`order`), and each
gives its draws one after another (`source`). Nothing is remembered but n, so training goes on exactly where it was, at
any number of ranks or workers. The order is worked out for thousands of sequences at once, and frames are copied file
by file into one array for a batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8, UInt16
from torch import Tensor

from toto.runtime.errors import ConfigError, MediaError, PassportError
from toto.tokens.online import Encoders, Pieces
from toto.tokens.passport import Passport
from toto.tokens.patches import patchify
from toto.tokens.sequence import CODE_OFFSET, END, START, pack, sequence_length
from toto.tokens.shards import Verify
from toto.training.buffers import Buffers
from toto.training.order import Turns
from toto.training.permutation import Numbers
from toto.training.source import Source, SourceConfig, Views, Window

PLANNED_AT_ONCE = 4096
PLANS_KEPT = 2  # threads that read ahead may stand on either side of a border


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
        if pinned:
            made = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        else:
            made = torch.from_numpy(self.mixture.buffers.empty(shape, np.int64))
        ids = made.numpy()
        ids[:, 0] = np.repeat(self.mixture.start_ids[self.source], cut)
        fits = self.mixture.passport.vocab_size + CODE_OFFSET <= 2**16  # adding before converting takes half as long
        ids[:, 1:-1] = np.add(self.codes.reshape(len(ids), -1), CODE_OFFSET, dtype=np.uint16 if fits else np.int64)
        ids[:, -1] = END
        return made

    def patches(
        self, frames: int | None = None, *, part: slice = slice(None), device: torch.device | str = "cpu"
    ) -> Float[Tensor, "B N P"] | None:
        """The patches of what `sequences` makes of a part of the windows, on a device; None without pixels."""
        if self.pixels is None:
            return None
        clips = torch.from_numpy(self.pixels[part]).to(device, non_blocking=True)
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
        runs: of each source, the runs of frames of its draws.
        row: of each sequence, its row in the `runs` of its source.
    """

    source: Numbers
    draw: Numbers
    runs: list[Pieces]
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
        views: "in-turn" gives every input one of its views in an epoch.
        encoders: that make the codes of stores without any; by default this process does. `close` closes them.

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
        views: Views = "all",
        encoders: Encoders | None = None,
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
        self._encoders = encoders or Encoders()
        reading: dict[str, Any] = {"pixels": pixels, "verify": verify, "views": views, "encoders": self._encoders}
        self.sources = [
            Source(source, frames=frames, seed=seed, number=n, **reading) for n, source in enumerate(sources)
        ]
        for other in self.sources[1:]:
            self.passport.require_same(
                other.store.passport, where=str(other.config.path), fix="tokenize all sources alike"
            )
        self.start_ids = np.array([START[source.config.modality] for source in self.sources])
        self.buffers = Buffers()
        self._planned: dict[tuple[int, int], _Plan] = {}
        self._planning = threading.Lock()

    def close(self) -> None:
        """Stop the processes that encode, where there are any."""
        self._encoders.close()

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

    def batch(self, step: int, batch: int, *, slots: slice = slice(None), pinned: bool = False) -> Batch:
        """The windows of a step, or of some slots of it; may be called by several threads at once.

        Args:
            step: counted from 0.
            batch: sequences in a step.
            slots: `slice(rank, None, world)` is what one of several processes reads.
            pinned: keep pixels in page-locked memory, from which a GPU can copy while it computes.

        Raises:
            MediaError: an item of a store that is encoded as it is read can't be read any more.
        """
        steps = max(1, PLANNED_AT_ONCE // batch)
        plan = self._plan(step // steps * steps * batch, steps * batch)
        first = step % steps * batch
        chosen = np.arange(first, first + batch)[slots]
        source = plan.source[chosen]
        try:
            codes, pixels = self._read(source, plan, chosen, pinned=pinned)
        except MediaError as error:
            raise MediaError(f"{error.what} (at step {step + 1})", where=error.where, fix=error.fix) from None
        return Batch(mixture=self, source=source, draw=plan.draw[chosen], codes=codes, pixels=pixels)

    def windows(self, step: int, batch: int) -> list[Window]:
        """The windows of a whole batch, one by one."""
        return self.batch(step, batch).windows()

    def _plan(self, first: int, count: int) -> _Plan:
        """Where `count` sequences lie; the last plans are kept, since steps come one after another."""
        with self._planning:
            if (first, count) not in self._planned:
                self._planned = dict(list(self._planned.items())[1 - PLANS_KEPT :])
                self._planned[first, count] = self._new_plan(first, count)
            return self._planned[first, count]

    def _new_plan(self, first: int, count: int) -> _Plan:
        source, draw = self._turns.locate(np.arange(first, first + count))
        row, runs = np.empty_like(source), []
        for each in self.sources:
            mine = np.flatnonzero(source == each.number)
            row[mine] = np.arange(len(mine))
            runs.append(each.runs(draw[mine]))
        return _Plan(source=source, draw=draw, runs=runs, row=row)

    def _read(self, source: Numbers, plan: _Plan, chosen: Numbers, *, pinned: bool) -> tuple[Any, Any]:
        """Codes `[B, T, rows, cols]`, and pixels `[B, T, H, W, 3]` or None, of some planned sequences."""
        codes = self.buffers.empty((len(chosen), self.frames, *self.grid), np.uint16)
        pixels = None
        if self.sources[0].pixels:
            assert self.passport.frame_size is not None
            shape = len(chosen), self.frames, *self.passport.frame_size, 3
            pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).numpy()
        for each in self.sources:
            slots = np.flatnonzero(source == each.number)
            if len(slots):
                runs = plan.runs[each.number].of(plan.row[chosen[slots]])
                count = runs.items.shape[1]
                alone = len(slots) == len(chosen)
                places = None if alone else (slots[:, None] * count + np.arange(count)).ravel()
                into = codes.reshape(-1, each.run_frames, *self.grid)
                shown = None if pixels is None else pixels.reshape(-1, each.run_frames, *pixels.shape[2:])
                each.read(runs, into, shown, places)
        return codes, pixels


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
