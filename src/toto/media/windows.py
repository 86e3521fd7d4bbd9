"""Windows of one video in one pass over it, which jumps over what no window wants."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toto.media.images import OpenFile
from toto.media.timeline import Timeline, UntrustedSeekError, frames_from, read_timeline
from toto.media.video import Ended, Event, Kept, Video, open_video
from toto.runtime.errors import MediaError, ShortMediaError

SKIP_SECONDS = 2.0  # a gap that is worth a look at the packets
SKIP_FRAMES = 32  # a gap that is worth a seek


@dataclass(frozen=True, kw_only=True)
class Window:
    """The frames shown at `start <= t < end` (None: to the last), and of these every stride-th from `offset`."""

    start: float
    end: float | None
    offset: int = 0


def window_events(
    path: Path | OpenFile, windows: Sequence[Window], stride: int, name: str
) -> Generator[Event, None, None]:
    """What windows keep of a video, each decoded frame once; the same as if decoding had begun at the start.

    Damage in what is jumped over is nothing to any window.
    """
    readers = [_Reader(number, window, stride) for number, window in enumerate(windows)]
    try:
        timeline = read_timeline(path, _last_end(windows)) if isinstance(path, Path) and _has_gap(windows) else None
        progress = _Progress()
        try:
            with open_video(path, name) as video:
                yield from _read(video, readers, timeline, progress)
        except UntrustedSeekError:
            with open_video(path, name) as video:
                yield from _read(video, readers, None, _Progress(seen=progress.seen))
    except MediaError as error:
        yield from (Ended(reader=reader.number, error=error) for reader in readers if not reader.finished)


@dataclass(kw_only=True)
class _Progress:
    """How far a video has been read: the next frame's number, when the last one ends, and when it was shown."""

    count: int = 0
    end: float = 0.0
    seen: float | None = None


class _Reader:
    """How far one window has been read."""

    def __init__(self, number: int, window: Window, stride: int):
        self.number, self.window, self.stride = number, window, stride
        self.count = self.taken = self.damaged = 0
        self.finished = False

    def is_over(self, when: float) -> bool:
        """Whether a frame shown now comes after the window, which is not yet finished."""
        return not self.finished and self.window.end is not None and when >= self.window.end

    def wants(self, when: float, damaged: bool) -> bool:
        """Count a frame that lies in the window; whether it is to be kept."""
        if self.finished or when < self.window.start:
            return False
        place = self.count - self.window.offset
        self.count += 1
        self.damaged += damaged
        wanted = place >= 0 and place % self.stride == 0
        self.taken += wanted
        return wanted

    def finish(self, name: str, length: float) -> Ended:
        """The end of the window, in a video that was read up to `length` seconds."""
        self.finished = True
        error: MediaError | None = None
        if self.damaged:
            reason = f"{self.damaged} of {self.count} frames are damaged"
            error = MediaError(reason, where=name, fix="restore or remove it")
        elif not self.taken:
            reason = f"no frame at {self.window.start:g} s, the video has {length:.1f} s"
            error = ShortMediaError(reason, where=name, fix="check the window")
        return Ended(reader=self.number, error=error)


def _last_end(windows: Sequence[Window]) -> float | None:
    ends = [window.end for window in windows if window.end is not None]
    return max(ends) if len(ends) == len(windows) else None


def _has_gap(windows: Sequence[Window]) -> bool:
    """Whether there are seconds, before or between windows, that are worth jumping over."""
    reached: float = 0.0
    for window in sorted(windows, key=lambda window: window.start):
        if window.start - reached >= SKIP_SECONDS:
            return True
        reached = max(reached, float("inf") if window.end is None else window.end)
    return False


def _read(
    video: Video, readers: list[_Reader], timeline: Timeline | None, progress: _Progress
) -> Generator[Event, None, None]:
    """Frames up to the last one that any reader waits for; those already `seen` are passed over.

    Raises:
        UntrustedSeekError: after a jump, what came isn't what the timeline says.
    """
    frames = video.frames()
    jumped, look = False, timeline is not None
    seen = progress.seen
    while True:
        if timeline and look and (key := _jump(timeline, readers, progress.count)) is not None:
            yield from _pass_over(timeline, readers, key, video)
            frames, jumped = frames_from(video, timeline, key), True
            progress.count, progress.end = key, float(timeline.whens[key - 1]) + video.step
        look = False
        frame = next(frames, None)
        if frame is None:
            break
        if timeline and (progress.count >= len(timeline.pts) or frame.pts != timeline.pts[progress.count]):
            if jumped:
                raise UntrustedSeekError
            timeline = None
        when = video.seconds(frame.pts, progress.count)
        if seen is None or when > seen:
            for reader in readers:
                if reader.is_over(when):
                    yield reader.finish(video.name, progress.end)
                    look = True
            wanted = tuple(reader.number for reader in readers if reader.wants(when, frame.is_corrupt))
            if wanted:
                yield Kept(readers=wanted, index=progress.count, when=when, frame=frame, rate=video.rate)
            progress.seen = when
        progress.end = when + video.step
        progress.count += 1
        if all(reader.finished for reader in readers):
            return
    if timeline and jumped and progress.count != len(timeline.pts):
        raise UntrustedSeekError
    video.require_whole(progress.end, progress.count)
    yield from (reader.finish(video.name, progress.end) for reader in readers if not reader.finished)


def _jump(timeline: Timeline, readers: list[_Reader], count: int) -> int | None:
    """The key frame to continue with, where that saves decoding: none of the frames before it is wanted by anybody."""
    waiting = [timeline.first_at(reader.window.start) for reader in readers if not reader.finished]
    key = timeline.key_before(max(count, min(waiting, default=count)))
    return key if key - count >= SKIP_FRAMES else None


def _pass_over(timeline: Timeline, readers: list[_Reader], key: int, video: Video) -> Iterator[Ended]:
    """The ends of the windows that a jump passes, as they would have come."""
    over = [
        (timeline.first_at(reader.window.end), reader.number, reader)
        for reader in readers
        if not reader.finished and reader.window.end is not None and timeline.first_at(reader.window.end) < key
    ]
    for place, _, reader in sorted(over, key=lambda each: each[:2]):
        yield reader.finish(video.name, float(timeline.whens[place - 1]) + video.step if place else 0.0)
