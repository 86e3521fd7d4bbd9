"""Videos by FFmpeg: opening them, their frames one after another, and clips of bounded size made of those.

Decoding takes one thread. With slice threads H.264 decoders drop their error detection, and damaged files pass as
whole ones; with frame threads the damage that is found depends on the number of threads. Pixels of whole files are
the same either way. A second thread converts large frames to RGB beside the decoder, and many files are decoded by
many processes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from toto.media import limits
from toto.media.clip import Clip
from toto.media.images import OpenFile
from toto.runtime.ahead import ahead
from toto.runtime.errors import MediaError

CHUNK_FRAMES = 32
PIXELS_AT_ONCE = 4_000_000  # 12 MB in RGB, which the allocator reuses; fresh memory for larger clips costs more
FRAMES_AHEAD = 2
PIXELS_WORTH_A_THREAD = 200_000  # below, handing frames over costs more than it saves

Pixels = npt.NDArray[np.uint8]
NOTHING: Pixels = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Video:
    """An opened video file, its first video stream, and its average frames a second (0: unknown).

    `first` is when the stream starts, in units of `unit` seconds (None: unknown).
    """

    container: InputContainer
    stream: VideoStream
    rate: float
    first: int
    unit: Fraction | None
    name: str

    @property
    def step(self) -> float:
        """Seconds that a frame is shown."""
        return 1 / self.rate if self.rate else 0.0

    def frames(self) -> Iterator[VideoFrame]:
        """All frames from the start, as they are shown."""
        yield from self.container.decode(self.stream)

    def seconds(self, pts: int | None, count: int) -> float:
        """When frame `count` is shown, counted from the start of its stream."""
        if pts is None or self.unit is None:
            return count / self.rate if self.rate else 0.0
        return (pts - self.first) * self.unit.numerator / self.unit.denominator

    def require_whole(self, end: float, count: int) -> None:
        """Refuse a video whose last frame ends well before the length that it declares.

        The stream's own length counts where there is one; a container's only where nothing else could be longer.

        Raises:
            MediaError: it holds no frame, or was cut off.
        """
        if count == 0:
            raise MediaError("holds no frame", where=self.name, fix="remove it from the folder")
        declared = None
        if self.stream.duration is not None and self.unit is not None:
            declared = float(self.stream.duration * self.unit)
        elif self.container.duration is not None and len(self.container.streams) == 1:
            declared = self.container.duration / av.time_base
        slack = max(0.25, 2 * self.step)
        if declared is not None and end < declared - max(slack, 0.05 * declared):
            raise MediaError(
                f"ends after {end:.1f} s ({count} frames), but declares {declared:.1f} s",
                where=self.name,
                fix="it was cut off: restore or remove it",
            )


@contextlib.contextmanager
def open_video(path: Path | OpenFile, name: str) -> Iterator[Video]:
    """An open video; what FFmpeg says while it is read becomes one line.

    Raises:
        MediaError: it is no video, can't be decoded, or declares too many pixels.
    """
    try:
        place = str(path.absolute()) if isinstance(path, Path) else path
        bound = {"max_pixels": str(limits.MAX_VIDEO_PIXELS)}  # also where the stream says another size than the file
        with av.open(place, "r", metadata_errors="replace", options=bound) as container:
            if not container.streams.video:
                raise MediaError("holds no video stream", where=name, fix="remove it from the folder")
            stream = container.streams.video[0]
            codec = getattr(stream, "codec_context", None)
            if codec is None:
                raise MediaError("its codec is unknown", where=name, fix="convert it to H.264")
            if codec.height * codec.width == 0:  # what FFmpeg refused for its size has none
                reason = f"declares no size, or more than {limits.MAX_VIDEO_PIXELS:,} pixels"
                raise MediaError(reason, where=name, fix="restore or remove it")
            limits.require_size(codec.height, codec.width, limits.MAX_VIDEO_PIXELS, where=name)
            codec.options = bound
            codec.thread_type = "NONE"
            codec.thread_count = 1
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            first, unit = stream.start_time or 0, stream.time_base
            yield Video(container=container, stream=stream, rate=rate, first=first, unit=unit, name=name)
    except av.error.FFmpegError as error:
        raise MediaError(f"video can't be decoded ({error.strerror})", where=name, fix="restore or remove it") from None
    except (ValueError, MemoryError) as error:
        raise MediaError(f"video can't be decoded ({error})", where=name, fix="restore or remove it") from None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A frame that some readers of a video keep: their numbers, the frame's own number, and its seconds."""

    readers: tuple[int, ...]
    index: int
    when: float
    frame: VideoFrame
    rate: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A reader has all of its frames, or can't have them."""

    reader: int
    error: MediaError | None = None


Event = Kept | Ended


def gather(events: Generator[Event, None, None], name: str) -> Iterator[tuple[int, Clip | MediaError]]:
    """Clips of bounded size, with the number of their reader; or what is wrong with it.

    Of large frames the events are made in a thread of their own, so that one is converted while the next is decoded.
    """
    convert = _Converter()
    held: dict[int, _Held] = defaultdict(lambda: _Held(name))
    first = next(events, None)
    large = isinstance(first, Kept) and first.frame.width * first.frame.height >= PIXELS_WORTH_A_THREAD
    with contextlib.closing(ahead(events, FRAMES_AHEAD) if large else events) as following:
        for event in itertools.chain([first] if first else [], following):
            if isinstance(event, Ended):
                rest = held.pop(event.reader, None)
                if event.error:
                    yield event.reader, event.error
                elif rest and rest.whens:
                    yield event.reader, rest.clip()
                continue
            for reader in event.readers:
                chunk = held[reader]
                chunk.add(event, convert)
                if chunk.full:
                    yield reader, chunk.clip()


class _Converter:
    """Frames as uint8 `[H, W, 3]`, upright; the last one is remembered, as windows that overlap ask for it again."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._last: tuple[VideoFrame, tuple[int, int] | None, Pixels] | None = None

    def __call__(self, frame: VideoFrame, size: tuple[int, int] | None = None) -> Pixels:
        """A view of the frame's pixels, scaled to `size` (height and width once upright) where it is given."""
        if self._last and self._last[0] is frame and self._last[1] == size:
            return self._last[2]
        turns = round(frame.rotation / 90) % 4
        height, width = (None, None) if size is None else size[::-1] if turns % 2 else size
        rgb = self._reformatter.reformat(frame, format="rgb24", width=width, height=height, threads=1)
        if rgb is frame:
            pixels = np.asarray(frame.to_ndarray(), dtype=np.uint8)
        else:
            plane = rgb.planes[0]
            rows = np.frombuffer(memoryview(plane), dtype=np.uint8)[: rgb.height * plane.line_size]
            pixels = rows.reshape(rgb.height, plane.line_size)[:, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
        upright = np.rot90(pixels, k=turns) if turns else pixels
        self._last = frame, size, upright
        return upright


class _Held:
    """Frames of one reader's next clip, copied once, to where they stay; all have the size of its first one."""

    def __init__(self, name: str):
        self._name = name
        self._size: tuple[int, int] | None = None
        self._room = 0
        self._frames: Pixels = NOTHING
        self.indices: list[int] = []
        self.whens: list[float] = []
        self._rate = 0.0

    def add(self, kept: Kept, convert: _Converter) -> None:
        pixels = convert(kept.frame)
        height, width = pixels.shape[:2]
        if self._size is None:
            self._size = height, width
            self._room = max(1, min(CHUNK_FRAMES, PIXELS_AT_ONCE // (height * width)))
        elif self._size != (height, width):
            pixels = convert(kept.frame, self._size)
        if not self.whens:
            self._frames = np.empty((self._room, *self._size, 3), dtype=np.uint8)
        self._frames[len(self.whens)] = pixels
        self.indices.append(kept.index)
        self.whens.append(kept.when)
        self._rate = kept.rate

    @property
    def full(self) -> bool:
        return len(self.whens) == self._room

    def clip(self) -> Clip:
        clip = Clip(
            frames=torch.from_numpy(self._frames[: len(self.whens)]),
            indices=torch.tensor(self.indices),
            timestamps=torch.tensor(self.whens, dtype=torch.float64),
            source=self._name,
            rate=self._rate,
        )
        self._frames, self.indices, self.whens = NOTHING, [], []
        return clip
