"""Some frames out of the middle of an item, by their numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from pathlib import Path

import torch

from toto.media.catalog import Item
from toto.media.clip import Clip
from toto.media.reading import stream_item
from toto.media.timeline import Timeline, UntrustedSeekError, frames_from, read_timeline
from toto.media.video import Ended, Event, Kept, gather, open_video
from toto.runtime.errors import MediaError, ShortMediaError

WORTH_A_SEEK = 64  # frames; fewer are decoded as fast as the packets are read
BEYOND = 5.0, 64  # seconds and frames after the last one that the packets are read for, as they aren't in order


def read_span(item: Item, *, first: int, count: int, stride: int = 1) -> Clip:
    """Frames `first, first + stride, ...` of a video or of its window, `count` of them; or an image.

    What lies before them is jumped over where the file allows it; the frames are the same.

    Raises:
        MediaError: they can't be read or are damaged.
        ShortMediaError: the item ends before them.
    """
    clips = _by_seeking(item, first, count, stride)
    if clips is None:
        clips, have = [], 0
        with contextlib.closing(_stream(item, first, count, stride)) as found:
            for clip in found:
                clips.append(clip)
                have += len(clip)
                if have >= count:
                    break
    have = sum(len(clip) for clip in clips)
    if have < count:
        reason = f"{have} of {count} frames from frame {first} on at stride {stride}"
        raise ShortMediaError(reason, where=item.id, fix="restore the file")
    return Clip(
        frames=torch.cat([clip.frames for clip in clips])[:count],
        indices=torch.cat([clip.indices for clip in clips])[:count],
        timestamps=torch.cat([clip.timestamps for clip in clips])[:count],
        source=item.id,
        rate=clips[0].rate,
    )


def _stream(item: Item, first: int, count: int, stride: int) -> Generator[Clip, None, None]:
    yield from stream_item(item, stride=stride, offset=first, limit=count)


def _by_seeking(item: Item, first: int, count: int, stride: int) -> list[Clip] | None:
    """The clips of a span of a whole file; None where it has to be read from its start."""
    if item.kind == "image" or item.part is not None or not isinstance(item.path, Path) or first < WORTH_A_SEEK:
        return None
    last = first + (count - 1) * stride
    timeline = _timeline(item.path, last)
    if timeline is None or last >= len(timeline.pts) or timeline.key_before(first) == 0:
        return None
    try:
        found = list(gather(_kept(item.path, timeline, range(first, last + 1, stride), item.id), item.id))
    except UntrustedSeekError:
        return None
    clips = [clip for _, clip in found if isinstance(clip, Clip)]
    return clips if len(clips) == len(found) else None


def _timeline(path: Path, last: int) -> Timeline | None:
    """The packets as far as they are needed, by the average rate, or all of them."""
    try:
        with open_video(path, str(path)) as video:
            rate = video.rate
    except MediaError:
        return None
    seconds, frames = BEYOND
    until = math.ceil(last / rate + seconds) if rate else None
    timeline = read_timeline(path, until)
    if timeline is not None and until is not None and last + frames >= len(timeline.pts):
        return read_timeline(path, None)
    return timeline


def _kept(path: Path, timeline: Timeline, wanted: range, name: str) -> Generator[Event, None, None]:
    """The wanted frames, as they would have come from the start.

    Raises:
        UntrustedSeekError: what comes isn't what the packets promise, or is damaged.
    """
    key = timeline.key_before(wanted.start)
    with open_video(path, name) as video:
        for index, frame in enumerate(frames_from(video, timeline, key), start=key):
            if index >= len(timeline.pts) or frame.pts != timeline.pts[index] or frame.is_corrupt:
                raise UntrustedSeekError
            if index in wanted:
                when = video.seconds(frame.pts, index)
                yield Kept(readers=(0,), index=index, when=when, frame=frame, rate=video.rate)
            if index == wanted[-1]:
                yield Ended(reader=0)
                return
    raise UntrustedSeekError
