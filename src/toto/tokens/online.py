"""Codes that are made when they are read: windows decoded, cropped anew and encoded by worker processes.

`toto tokenize --online` decodes every item once, so that what can't be used is in the ledger and frame counts are
exact, and keeps no codes. What is made of a piece depends on the piece alone: not on the number of workers, nor on
what else is read. Of the centre crop from frame 0, it is what `toto tokenize` stores.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt64

from toto.media.catalog import Item
from toto.media.spans import read_span
from toto.runtime.device import one_thread, pick_device
from toto.runtime.errors import MediaError, PassportError
from toto.runtime.seed import stream
from toto.runtime.workers import Lost, StoppedError, Workers
from toto.tokens.origin import Origin
from toto.tokens.passport import Passport
from toto.tokens.shards import Codes, Pixels, TokenStore
from toto.tokens.tokenizer import Arithmetic, Tokenizer, load_tokenizer
from toto.tokens.views import View

TIME_LIMIT = 600.0  # seconds for a sequence's frames
REMAKE: Final = "make the store again with `toto tokenize`"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Runs of consecutive frames of a store's items, R of them for each of N sequences.

    Attributes:
        items: their places in the store.
        starts: the first frame of each run, counted at the stride.
        offsets: the first frame of the item that counts, below the stride; None is frame 0.
        crops: keys that random crops are drawn by, the same for all runs of an item in an epoch; None is the centre.
            Stored codes have neither.
    """

    items: Int64[np.ndarray, "N R"]
    starts: Int64[np.ndarray, "N R"]
    offsets: Int64[np.ndarray, "N R"] | None = None
    crops: UInt64[np.ndarray, "N R"] | None = None

    def of(self, rows: npt.NDArray[np.int64]) -> Pieces:
        """Those of some of the sequences."""
        return Pieces(
            items=self.items[rows],
            starts=self.starts[rows],
            offsets=None if self.offsets is None else self.offsets[rows],
            crops=None if self.crops is None else self.crops[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Frames of an item that are encoded: `first, first + stride, ...`, `count` of them, and what draws their crop."""

    item: Item
    first: int
    count: int
    stride: int
    crop: int | None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The pieces of a sequence, whether their pixels are wanted too, and how they are made."""

    pieces: tuple[Piece, ...]
    pixels: bool
    size: int
    tokenizer: str
    precision: Arithmetic
    passport: Passport


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Codes and pixels of all frames of a task; or what is wrong with an item of it."""

    codes: Codes | None = None
    pixels: Pixels | None = None
    error: MediaError | None = None


class Encoders:
    """What encodes: processes of one thread each, started when the first piece is wanted, or this one.

    May be used by several threads at once where it has processes.

    Args:
        workers: processes; a decoder that crashes takes down its own only. 0 encodes in this one.
        device: where the tokenizer runs.
    """

    def __init__(self, *, workers: int = 0, device: str = "auto"):
        self._workers, self._device = workers, device
        self._pool: Workers[_Task, _Made] | None = None
        self._lock, self._closed = threading.Lock(), False

    def make(self, tasks: list[_Task]) -> Iterator[tuple[_Task, _Made | Lost]]:
        """What becomes of each task, in their order."""
        if not self._workers:
            for task in tasks:
                with one_thread():
                    made = _make(task, self._device)
                yield task, made
            return
        with self._lock:
            if self._closed:
                raise StoppedError("the processes that encode are closed")
            if self._pool is None:
                start = Workers(_start, _make_here, (self._device,), count=self._workers, what="the decoder")
                self._pool = start.__enter__()
        yield from self._pool.in_order(tasks, limit=lambda _: TIME_LIMIT)

    def close(self) -> None:
        """Stop the processes, also those at work."""
        with self._lock:
            self._closed = True
        if self._pool is not None:
            self._pool.__exit__(None, None, None)


class OnlineStore:
    """The codes of a store without any, made from the files that it was made of.

    Args:
        store: made by `toto tokenize --online`.
        encoders: that make them.

    Raises:
        ConfigError: the source isn't there any more, or holds other files than when the store was made.
    """

    def __init__(self, store: TokenStore, encoders: Encoders):
        self.store, self._encoders = store, encoders
        self._job = store.manifest["job"]
        self._origin = Origin.of_job(self._job)

    @cached_property
    def items(self) -> list[Item]:
        """The item behind each row of the store."""
        catalog = self._origin.catalog(where=self.store.folder)
        by_id = {item.id: item for item in catalog.items}
        return [by_id[str(name)] for name in self.store.table.column("id").to_pylist()]

    def read(
        self, pieces: Pieces, count: int, codes: Any, pixels: Any | None, places: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Make runs of `count` frames; see `toto.training.source.Source.read` for where they go.

        Raises:
            MediaError: an item that could be read when the store was made can't be any more.
        """
        tasks = [self._task(pieces, row, count, pixels is not None) for row in range(len(pieces.items))]
        runs = pieces.items.shape[1]
        where = np.arange(pieces.items.size) if places is None else places
        for (task, made), into in zip(self._encoders.make(tasks), where.reshape(-1, runs), strict=True):
            if isinstance(made, Lost):
                names = ", ".join(dict.fromkeys(piece.item.id for piece in task.pieces))
                raise MediaError(f"could be read when its store was made: {made.reason}", where=names, fix=REMAKE)
            if made.error is not None:
                raise made.error
            assert made.codes is not None
            codes[into] = made.codes.reshape(runs, count, *made.codes.shape[1:])
            if pixels is not None:
                assert made.pixels is not None
                pixels[into] = made.pixels.reshape(runs, count, *made.pixels.shape[1:])

    def _task(self, pieces: Pieces, row: int, count: int, pixels: bool) -> _Task:
        stride = self.store.stride
        found = []
        for run, (item, start) in enumerate(zip(pieces.items[row].tolist(), pieces.starts[row].tolist(), strict=True)):
            offset = 0 if pieces.offsets is None else int(pieces.offsets[row, run])
            crop = None if pieces.crops is None else int(pieces.crops[row, run])
            first = offset + start * stride
            found.append(Piece(item=self.items[item], first=first, count=count, stride=stride, crop=crop))
        return _Task(
            pieces=tuple(found),
            pixels=pixels,
            size=int(self._job["size"]),
            tokenizer=self._origin.tokenizer,
            precision=self._job.get("precision", "fp32"),
            passport=self.store.passport,
        )


def crop_of(piece: Piece, size: int) -> Pixels:
    """The frames of a piece, resized and cropped, `[count, size, size, 3]`."""
    rng = None if piece.crop is None else stream(piece.crop, "crop")
    clip = read_span(piece.item, first=piece.first, count=piece.count, stride=piece.stride)
    cropped: Pixels = View(size=size, stride=1, rng=rng).crop(clip).numpy()
    return cropped


def _make(task: _Task, device: str) -> _Made:
    crops = []
    for piece in task.pieces:
        try:
            crops.append(crop_of(piece, task.size))
        except MediaError as error:
            what = f"could be read when its store was made: {error.what}"
            return _Made(error=MediaError(what, where=piece.item.id, fix=REMAKE))
    frames = np.concatenate(crops)
    tokenizer = _tokenizer(task, device)
    codes = tokenizer.encode(torch.from_numpy(frames).to(tokenizer.device)).cpu().numpy().astype(np.uint16)
    return _Made(codes=codes, pixels=frames if task.pixels else None)


def _tokenizer(task: _Task, device: str) -> Tokenizer:
    """The tokenizer of a task; each is loaded once in a process."""
    key = task.tokenizer, task.precision, device
    if key not in _loaded:
        found = load_tokenizer(task.tokenizer, device=pick_device(device), precision=task.precision)
        here = found.at(task.size, task.size)
        if here != task.passport:
            raise PassportError("isn't the tokenizer that the store was made for", where=task.tokenizer, fix=REMAKE)
        _loaded[key] = found
    return _loaded[key]


_loaded: dict[tuple[str, str, str], Tokenizer] = {}
_device = "cpu"


def _start(device: str) -> None:
    """Begin the life of a worker."""
    global _device
    torch.set_num_threads(1)
    _device = device


def _make_here(task: _Task) -> _Made:
    return _make(task, _device)
