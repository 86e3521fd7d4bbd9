"""Labelled files -> what a model reads: views drawn anew in every epoch, or stored once and taken in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.evaluation.finetune_config import Augmentation
from toto.evaluation.labelled import LabelledClips
from toto.evaluation.views import Length, length_of
from toto.media.catalog import Item
from toto.media.ledger import LedgerRow
from toto.media.reading import read_item
from toto.media.spans import read_span
from toto.media.transforms import Box, apply_crop, resize, square
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.files import read_json, remove_leftovers, write_json, written_aside
from toto.runtime.progress import Progress
from toto.runtime.ranks import ALONE, Ranks
from toto.runtime.seed import stream
from toto.tokens.patches import patchify
from toto.tokens.sequence import Modality, pack
from toto.tokens.tokenizer import Tokenizer

TRIES = 10
BLOCK = 256  # items in a file of stored views
FRAMES_AT_ONCE = 64  # that are encoded
ENCODED_TOGETHER = 16  # items

Kept = npt.NDArray[Any]


class Eyes:
    """Pixels to what a model reads, by way of what is kept of them: codes, or for a model of patches the pixels.

    Args:
        tokenizer: that makes the codes; None for patches.
        grid: rows and columns of a frame.
        modality: of the sequences.
    """

    def __init__(self, tokenizer: Tokenizer | None, grid: tuple[int, int], modality: Modality):
        self.tokenizer, self.grid, self.modality = tokenizer, grid, modality

    def kept(self, frames: UInt8[Tensor, "B T H W 3"]) -> Kept:
        """Codes `[B, T, rows, cols]`, or pixels `[B, T, H, W, 3]`."""
        if self.tokenizer is None:
            return frames.numpy()
        parts = torch.split(frames.flatten(0, 1), FRAMES_AT_ONCE)
        codes = torch.cat([self.tokenizer.encode(part.to(self.tokenizer.device)) for part in parts])
        kept: npt.NDArray[np.uint16] = codes.cpu().numpy().astype(np.uint16)
        return kept.reshape(*frames.shape[:2], *kept.shape[1:])

    def inputs(self, kept: Kept, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Sequences `[B, S]`, and patches where the model reads those."""
        if self.tokenizer is None:
            frames = torch.from_numpy(kept).to(device)
            blank = torch.zeros((*frames.shape[:2], *self.grid), dtype=torch.int64, device=device)
            return pack(blank, self.modality), patchify(frames, *self.grid)
        codes = torch.from_numpy(kept.astype(np.int64)).to(device)
        return pack(codes, self.modality), None


def augmented(
    frames: UInt8[Tensor, "T H W 3"], size: int, rng: np.random.Generator, config: Augmentation
) -> UInt8[Tensor, "T size size 3"]:
    """A random part of the frames, resized to a square, perhaps mirrored."""
    if config.area is None:
        out = square(frames, size, "random", rng)
    else:
        box = random_box(frames.shape[1], frames.shape[2], rng, config.area, config.aspect)
        out = resize(apply_crop(frames, box), size, size)
    return out.flip(2) if rng.random() < config.flip else out


def random_box(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float], aspect: tuple[float, float]
) -> Box:
    """A part of a frame of random area and aspect (its logarithm is uniform), anywhere in it; see GoogLeNet's crops.

    Where ten draws don't fit, the largest part in the middle whose aspect is allowed.
    """
    for _ in range(TRIES):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(top=int(rng.integers(height - h + 1)), left=int(rng.integers(width - w + 1)), height=h, width=w)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return Box(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w)


def training_clip(
    item: Item, length: Length, *, frames: int, stride: int, rng: np.random.Generator
) -> UInt8[Tensor, "T H W 3"]:
    """Frames of an item from a random one on; of a video that is too short, the last one is repeated.

    Raises:
        MediaError: it can't be read.
    """
    if item.kind == "image":
        return read_item(item).frames
    start = int(rng.integers(max(0, length.frames - ((frames - 1) * stride + 1)) + 1))
    count = min(frames, -(-(length.frames - start) // stride))
    found = read_span(item, first=start, count=count, stride=stride).frames
    return torch.cat([found, found[-1:].expand(frames - count, -1, -1, -1)]) if count < frames else found


class FreshViews:
    """Training views, drawn anew in every epoch: what is drawn depends on the seed, the epoch and the item alone.

    Items that can't be read are left out of their batch, and are named by `failed`.
    """

    def __init__(
        self,
        clips: LabelledClips,
        eyes: Eyes,
        *,
        frames: int,
        stride: int,
        size: int,
        augmentation: Augmentation,
        seed: int,
    ):
        if not clips.items:
            raise ConfigError("are made by code", where=clips.name, fix="give files")
        self.clips, self.eyes = clips, eyes
        self.frames, self.stride, self.size = frames, stride, size
        self._augmentation, self._seed = augmentation, seed
        self._lengths: dict[int, Length] = {}
        self.failed: dict[str, LedgerRow] = {}

    def crop(self, number: int, epoch: int) -> UInt8[Tensor, "T size size 3"]:
        """The view of an item in an epoch.

        Raises:
            MediaError: it can't be read.
        """
        item = self.clips.items[number]
        if number not in self._lengths:
            self._lengths[number] = length_of(item)
        rng = stream(self._seed, "training view", epoch, item.id)
        clip = training_clip(item, self._lengths[number], frames=self.frames, stride=self.stride, rng=rng)
        return augmented(clip, self.size, rng, self._augmentation)

    def batch(self, numbers: Sequence[int], epoch: int) -> tuple[list[int], Kept | None]:
        """Those of some items that could be read, and what is kept of them; None where none could."""
        found, crops = [], []
        for number in numbers:
            try:
                crops.append(self.crop(number, epoch))
                found.append(number)
            except MediaError as error:
                self.fail(number, error)
        return found, self.eyes.kept(torch.stack(crops)) if crops else None

    def fail(self, number: int, error: MediaError) -> None:
        """Name an item that can't be read."""
        id = self.clips.ids[number]
        self.failed[id] = LedgerRow(id=id, kind=self.clips.modality, status=error.status, reason=error.what)


class StoredViews:
    """So many views of each item, made once in the order of the items; finished files outlive a killed run.

    Args:
        fresh: makes them: view v is that of epoch v.
        views: of each item.
        folder: where they lie, `block-NNNNN.npy` with the items that failed beside it.
    """

    def __init__(self, fresh: FreshViews, views: int, folder: Path):
        self._fresh, self._views, self._folder = fresh, views, folder
        self._blocks: list[Kept] = []
        self._places: dict[int, tuple[int, int]] = {}

    @property
    def failed(self) -> dict[str, LedgerRow]:
        """Items that can't be read, by their ids."""
        return self._fresh.failed

    def make(self, ranks: Ranks = ALONE) -> None:
        """Make what isn't there yet, a part of the files in each process, and map all of it."""
        count = len(self._fresh.clips.items)
        ranks.from_first(self._make_room)
        blocks = [range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]
        with Progress(f"{self._views} views of {self._fresh.clips.name}", total=count, unit="items") as progress:
            for block, numbers in enumerate(blocks):
                if block % ranks.world == ranks.rank and not self._files(block)[1].exists():
                    self._make(numbers, *self._files(block))
                progress.advance(len(numbers))
        ranks.gathered(None)  # all are there
        for block in range(len(blocks)):
            self._map(*self._files(block))

    def batch(self, numbers: Sequence[int], epoch: int) -> tuple[list[int], Kept | None]:
        """Those of some items that could be read, and what is kept of them."""
        found = [number for number in numbers if number in self._places]
        view = epoch % self._views
        rows = [self._blocks[block][place, view] for block, place in map(self._places.__getitem__, found)]
        return found, np.stack(rows) if rows else None

    def _files(self, block: int) -> tuple[Path, Path]:
        """Codes, and the table of what is in them."""
        return self._folder / f"block-{block:05d}.npy", self._folder / f"block-{block:05d}.json"

    def _make_room(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)

    def _map(self, codes: Path, table: Path) -> None:
        known = read_json(table, what="table of stored views")
        self._fresh.failed.update({row["id"]: LedgerRow(**row) for row in known["failed"]})
        if known["items"]:
            self._blocks.append(np.load(codes, mmap_mode="r"))
            for place, number in enumerate(known["items"]):
                self._places[number] = len(self._blocks) - 1, place

    def _make(self, numbers: range, codes: Path, table: Path) -> None:
        fresh, items, kept = self._fresh, [], []
        for first in range(0, len(numbers), ENCODED_TOGETHER):
            crops = []
            for number in numbers[first : first + ENCODED_TOGETHER]:
                try:
                    crops.append(torch.stack([fresh.crop(number, view) for view in range(self._views)]))
                    items.append(number)
                except MediaError as error:
                    fresh.fail(number, error)
            if crops:
                codes_of = fresh.eyes.kept(torch.cat(crops))
                kept += list(codes_of.reshape(len(crops), self._views, *codes_of.shape[1:]))
        if kept:
            with written_aside(codes) as aside, aside.open("wb") as file:
                np.save(file, np.stack(kept))
        ids = [fresh.clips.ids[number] for number in numbers]
        failed = [vars(fresh.failed[id]) for id in ids if id in fresh.failed]
        write_json(table, {"items": items, "failed": failed})
