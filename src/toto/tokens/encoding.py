"""What becomes of items in a worker: decoded and cropped in one thread, encoded in another beside it.

The decoder runs some clips ahead, so the tokenizer's device waits for it only where decoding as a whole is slower.
Frames of several items are encoded together: a tokenizer that computes a fixed number at once (codes don't depend on
company then) has its hands full also where every item is a single image.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.media.catalog import Item, units
from toto.media.clip import Clip
from toto.media.ledger import Status
from toto.media.reading import stream_item, stream_unit
from toto.runtime.ahead import ahead
from toto.runtime.errors import MediaError, ShortMediaError
from toto.runtime.files import writing
from toto.tokens.shards import Codes
from toto.tokens.tokenizer import Tokenizer
from toto.tokens.views import View, stored_view

Task = tuple[Item, ...]  # what a worker gets at once; windows of one video follow each other
FRAMES_AT_ONCE = 64
CLIPS_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How items become frames to encode; see `toto.tokens.extract.TokenizeConfig` for what the fields mean."""

    size: int
    stride: int
    min_frames: int
    views: int
    seed: int
    online: bool = False


@dataclass(frozen=True, kw_only=True)
class EncodedView:
    """Codes of one view of an item.

    Attributes:
        codes: of all frames; where none are kept, `[T, 0, 0]`.
        fps: the frames' rate.
        pixels: the file that the frames wait in until the shard is written, or on their way from another machine
            the bytes that it will hold; None where nobody wants them.
    """

    codes: Codes
    fps: float
    pixels: Path | npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a worker made of an item: its views, or why there are none."""

    item: Item
    views: tuple[EncodedView, ...] = ()
    status: Status = "ok"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """The next frames of a view: which item of the task, which view of it, and the frames' rate."""

    place: int
    view: int
    frames: UInt8[Tensor, "T R R 3"]
    rate: float


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Why an item of the task can't be used."""

    place: int
    error: MediaError


def encode(task: Task, tokenizer: Tokenizer, framing: Framing, *, waiting: Path | None = None) -> tuple[Encoded, ...]:
    """Decode and encode every view of some items; what is wrong with one is returned, not raised.

    Args:
        task: the items.
        tokenizer: that encodes.
        framing: how items become frames.
        waiting: a folder where the frames are kept in files, one a view, for whoever wants pixels too.
    """
    codes: dict[tuple[int, int], list[Codes]] = defaultdict(list)
    rates: dict[tuple[int, int], float] = {}
    wrong: dict[int, MediaError] = {}
    with contextlib.closing(ahead(_decode(task, framing, waiting), CLIPS_AHEAD)) as decoded:
        for together in _gather(decoded):
            crops = [each for each in together if isinstance(each, Crops)]
            wrong |= {each.place: each.error for each in together if isinstance(each, Wrong)}
            if not crops:
                continue
            frames = torch.cat([each.frames for each in crops]) if len(crops) > 1 else crops[0].frames
            if framing.online:
                found = np.empty((len(frames), 0, 0), np.uint16)
            else:
                found = tokenizer.encode(frames.to(tokenizer.device)).cpu().numpy().astype(np.uint16)
            ends = np.cumsum([len(each.frames) for each in crops])[:-1]
            for each, part in zip(crops, np.split(found, ends), strict=True):
                codes[each.place, each.view].append(part)
                rates[each.place, each.view] = each.rate
    made = []
    for place, item in enumerate(task):
        if place in wrong:
            made.append(failed(item, wrong[place], framing, waiting=waiting))
            continue
        views = tuple(
            EncodedView(
                codes=np.concatenate(codes[place, view]),
                fps=rates[place, view],
                pixels=waiting_file(waiting, item, view) if waiting else None,
            )
            for view in range(framing.views)
        )
        made.append(Encoded(item=item, views=views))
    return tuple(made)


def failed(item: Item, error: MediaError, framing: Framing, *, waiting: Path | None = None) -> Encoded:
    """An item that can't be used; the frames that wait for it are dropped."""
    for view in range(framing.views if waiting else 0):
        assert waiting is not None
        waiting_file(waiting, item, view).unlink(missing_ok=True)
    return Encoded(item=item, status=error.status, reason=error.what)


def view_id(item: str, view: int) -> str:
    """The name of a view in a store."""
    return f"{item}#{view}" if view else item


def waiting_file(waiting: Path, item: Item, view: int) -> Path:
    """Where a view's frames wait: a video's may be larger than memory, and would be slow to hand over."""
    name = hashlib.sha256(view_id(item.id, view).encode()).hexdigest()
    return waiting / f"{name[:32]}.pixels"


def _gather(decoded: Iterable[Crops | Wrong]) -> Iterator[list[Crops | Wrong]]:
    """What came of the decoder, in portions of at least `FRAMES_AT_ONCE` frames."""
    held: list[Crops | Wrong] = []
    frames = 0
    for each in decoded:
        held.append(each)
        frames += len(each.frames) if isinstance(each, Crops) else 0
        if frames >= FRAMES_AT_ONCE:
            yield held
            held, frames = [], 0
    if held:
        yield held


def _decode(task: Task, framing: Framing, waiting: Path | None) -> Iterator[Crops | Wrong]:
    """The crops of every view of the items, one item after the other; or of windows of one video, as they come."""
    first = 0
    for items in units(task):
        bad: set[int] = set()
        for view in range(framing.views):
            for each in _decode_view(items, view, framing, waiting):
                place = first + each.place
                if place not in bad:
                    yield replace(each, place=place)
                if isinstance(each, Wrong):
                    bad.add(place)
            if len(bad) == len(items):
                break
        first += len(items)


def _decode_view(items: Task, number: int, framing: Framing, waiting: Path | None) -> Iterator[Crops | Wrong]:
    """One view of an item, or of all windows of one video in one pass."""
    views = [
        stored_view(item.id, number, size=framing.size, stride=framing.stride, seed=framing.seed) for item in items
    ]
    taken = [0] * len(items)
    wrong: set[int] = set()
    with contextlib.ExitStack() as files:
        if waiting:
            files.enter_context(writing(waiting))
        kept = [
            files.enter_context(waiting_file(waiting, item, number).open("wb")) if waiting else None for item in items
        ]
        for place, found in _clips(items, views, framing.stride):
            try:
                clip = _usable(found)
                frames = views[place].crop(clip)
            except MediaError as error:
                wrong.add(place)
                yield Wrong(place=place, error=error)
                if len(wrong) == len(items):
                    return
                continue
            taken[place] += len(frames)
            if file := kept[place]:
                file.write(frames.numpy().data)
            yield Crops(place=place, view=number, frames=frames, rate=clip.rate)
    for place, item in enumerate(items):
        if place not in wrong and item.kind == "video" and taken[place] < framing.min_frames:
            reason = f"{taken[place]} frames at stride {framing.stride}, fewer than {framing.min_frames}"
            yield Wrong(place=place, error=ShortMediaError(reason, where=item.id))


def _usable(clip: Clip | MediaError) -> Clip:
    if isinstance(clip, MediaError):
        raise clip
    return clip


def _clips(items: Task, views: list[View], stride: int) -> Iterator[tuple[int, Clip | MediaError]]:
    if len(items) > 1:
        yield from stream_unit(items, stride=stride, offsets=[view.offset for view in views])
        return
    try:
        for clip in stream_item(items[0], stride=stride, offset=views[0].offset):
            yield 0, clip
    except MediaError as error:
        yield 0, error
