"""Files to clips: the one place where codecs are opened (PyAV for video, Pillow for images).

What is handled on purpose:

* Frames are counted as they are decoded. A stride counts frames, also where the frame rate varies; the timestamps
  say when each one really was.
* Rotation in a video's metadata and EXIF orientation are applied.
* Alpha is laid over white; grey becomes RGB; 16-bit images are scaled to 8 bits, not clipped.
* A frame whose size changes in mid-stream is scaled to the size of the first.
* A file that ends before the length it declares, or whose frames the decoder marks as damaged, is corrupt as a whole.
  Of a file that is read in windows, those are corrupt that the damage touches.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from toto.media.clip import Clip
from toto.media.sampling import require_frames
from toto.runtime.errors import MediaError, ShortMediaError

Kind = Literal["image", "video"]
OpenFile = io.BytesIO | io.BufferedReader

IMAGE_ENDINGS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pnm",
        ".jp2",
        ".avif",
    ]
)
VIDEO_ENDINGS = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".m2v",
        ".ts",
        ".mts",
        ".m2ts",
        ".wmv",
        ".asf",
        ".flv",
        ".f4v",
        ".3gp",
        ".3g2",
        ".ogv",
        ".vob",
        ".mxf",
        ".y4m",
        ".mjpeg",
        ".mjpg",
        ".apng",
    ]
)
MAX_PIXELS = 100_000_000
MIN_SIDE = 8
PIXELS_AT_ONCE = 32_000_000
CHUNK_FRAMES = 32
GREY_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


def media_kind(path: Path) -> Kind | None:
    """Whether a file is an image or a video by its ending; None where it is neither.

    A GIF is a video where it has several frames.
    """
    ending = path.suffix.lower()
    if ending == ".gif":
        return "video" if is_animated(path) else "image"
    if ending in IMAGE_ENDINGS:
        return "image"
    return "video" if ending in VIDEO_ENDINGS else None


def read_media(
    path: Path, *, stride: int = 1, offset: int = 0, limit: int | None = None, source: str | None = None
) -> Clip:
    """Read an image as a clip of one frame, or frames `offset, offset + stride, ...` of a video.

    Args:
        path: the file.
        stride: every `stride`-th frame is kept.
        offset: the first frame kept.
        limit: at most this many frames.
        source: the clip's source id; the path where None.

    Raises:
        MediaError: it can't be read, is damaged, or is neither image nor video.
        ShortMediaError: it holds no frame at `offset`, or frames too small to use.
    """
    kind = media_kind(path) if path.exists() else None
    if not path.is_file():
        raise MediaError("no such file", where=path, fix="check the path")
    if kind is None:
        raise MediaError("neither an image nor a video by its ending", where=path, fix="rename or convert it")
    if kind == "image":
        return read_image(path, source=source)
    clips = list(stream_video(path, stride=stride, offset=offset, limit=limit, source=source))
    return Clip(
        frames=torch.cat([clip.frames for clip in clips]),
        indices=torch.cat([clip.indices for clip in clips]),
        timestamps=torch.cat([clip.timestamps for clip in clips]),
        source=clips[0].source,
        rate=clips[0].rate,
    )


def read_clip(path: Path, *, frames: int, stride: int, offset: int = 0, source: str | None = None) -> Clip:
    """Read exactly `frames` frames at `stride`; a shorter video is refused with what it has and needs."""
    clip = read_media(path, stride=stride, offset=offset, limit=frames, source=source)
    if len(clip) < frames:
        require_frames(offset + (len(clip) - 1) * stride + 1, frames, stride, where=str(path))
    return clip


def read_image(path: Path | OpenFile, *, source: str | None = None) -> Clip:
    """Read an image file, or one in memory; see `read_media` for the errors."""
    name = source or str(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _require_size(image.height, image.width, where=name)
                pixels = _to_rgb(image)
    except Image.DecompressionBombError:
        raise MediaError(f"declares more than {MAX_PIXELS:,} pixels", where=name, fix="scale it down") from None
    except UnidentifiedImageError:
        raise MediaError("not an image that Pillow can read", where=name, fix="convert it to PNG or JPEG") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise MediaError(f"image can't be decoded ({error})", where=name, fix="restore or remove it") from None
    frames = torch.from_numpy(pixels).unsqueeze(0)
    return Clip(
        frames=frames,
        indices=torch.zeros(1, dtype=torch.int64),
        timestamps=torch.zeros(1, dtype=torch.float64),
        source=name,
    )


def stream_video(
    path: Path | OpenFile, *, stride: int = 1, offset: int = 0, limit: int | None = None, source: str | None = None
) -> Iterator[Clip]:
    """Frames `offset, offset + stride, ...` of a video (a file, or an open one) in consecutive clips of bounded size.

    Memory stays flat however long the video is: at most 32 frames or 32 megapixels are held at once.
    See `read_media` for the errors; damage at the end of a file is raised after the clips before it.
    """
    name = source or str(path)
    with _opened(path, name) as container:
        yield from _stream(container, stride, offset, limit, name)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The frames shown at `start <= t < end` (None: to the last), and of these every stride-th from `offset`."""

    start: float
    end: float | None
    offset: int = 0


def stream_windows(
    path: Path | OpenFile, windows: Sequence[Window], *, stride: int = 1, source: str | None = None
) -> Iterator[tuple[int, Clip | MediaError]]:
    """Several windows of one video in one pass over it, whether they overlap or not; frames are decoded once.

    Args:
        path: the file, or an open one.
        windows: what to read.
        stride: every `stride`-th frame of a window is kept, counted from its own first frame.
        source: the clips' source id.

    Yields:
        The number of a window, with a clip of its next frames, of bounded size; or with what is wrong with it, after
        which nothing more of it comes. What happens after a window's end is nothing to it.
    """
    name = source or str(path)
    readers = [_WindowReader(window, stride) for window in windows]
    try:
        with _opened(path, name) as container:
            yield from _stream_windows(container, readers, name)
    except MediaError as error:
        for number, reader in enumerate(readers):
            if not reader.finished:
                yield number, error


class _WindowReader:
    """How far one window has been read."""

    def __init__(self, window: Window, stride: int):
        self.window, self.stride = window, stride
        self.count = self.taken = self.damaged = 0
        self.finished = False
        self.held: list[tuple[int, float, Tensor]] = []

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

    def finish(self, name: str, rate: float, length: float) -> Iterator[Clip | MediaError]:
        """The last frames, or what is wrong."""
        self.finished = True
        if self.damaged:
            yield MediaError(
                f"{self.damaged} of {self.count} frames are damaged", where=name, fix="restore or remove it"
            )
        elif not self.taken:
            reason = f"no frame at {self.window.start:g} s, the video has {length:.1f} s"
            yield ShortMediaError(reason, where=name, fix="check the window")
        elif self.held:
            yield _clip(self.held, name, rate)
        self.held = []


def _stream_windows(
    container: InputContainer, readers: list[_WindowReader], name: str
) -> Iterator[tuple[int, Clip | MediaError]]:
    stream, chunk, rate = _video_of(container, name)
    count, end = 0, 0.0
    for frame in container.decode(stream):
        when = _seconds(frame, stream, count, rate)
        for number, reader in enumerate(readers):
            if not reader.finished and reader.window.end is not None and when >= reader.window.end:
                for last in reader.finish(name, rate, end):
                    yield number, last
            if reader.wants(when, frame.is_corrupt):
                reader.held.append((count, when, _pixels(frame, reader.held)))
                if len(reader.held) == chunk:
                    yield number, _clip(reader.held, name, rate)
                    reader.held = []
        end = when + (1 / rate if rate else 0.0)
        count += 1
        if all(reader.finished for reader in readers):
            return
    if count == 0:
        raise MediaError("holds no frame", where=name, fix="remove it from the folder")
    _require_whole(container, stream, end, count, rate, name)
    for number, reader in enumerate(readers):
        if not reader.finished:
            for last in reader.finish(name, rate, end):
                yield number, last


def codec_of(path: Path | OpenFile, kind: Kind, *, source: str | None = None) -> str:
    """The codec of a video ("h264"), the format of an image ("jpeg"); "unknown" where nobody can tell."""
    name = source or str(path)
    try:
        if kind == "image":
            with Image.open(path) as image:
                return (image.format or "unknown").lower()
        with _opened(path, name) as container:
            return _video_of(container, name)[0].codec_context.name
    except (MediaError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return "unknown"


@contextlib.contextmanager
def _opened(path: Path | OpenFile, name: str) -> Iterator[InputContainer]:
    """An open video; what FFmpeg says while it is read becomes one line."""
    try:
        place = str(path.absolute()) if isinstance(path, Path) else path
        with av.open(place, "r", metadata_errors="replace") as container:
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(f"video can't be decoded ({error.strerror})", where=name, fix="restore or remove it") from None
    except (ValueError, MemoryError) as error:
        raise MediaError(f"video can't be decoded ({error})", where=name, fix="restore or remove it") from None


def _video_of(container: InputContainer, name: str) -> tuple[VideoStream, int, float]:
    """The video stream, how many of its frames are held at once, and its frames a second."""
    if not container.streams.video:
        raise MediaError("holds no video stream", where=name, fix="remove it from the folder")
    stream = container.streams.video[0]
    if getattr(stream, "codec_context", None) is None:
        raise MediaError("its codec is unknown", where=name, fix="convert it to H.264")
    stream.thread_type = "SLICE"
    _require_size(stream.codec_context.height, stream.codec_context.width, where=name)
    chunk = max(1, min(CHUNK_FRAMES, PIXELS_AT_ONCE // (stream.codec_context.height * stream.codec_context.width)))
    return stream, chunk, float(stream.average_rate or stream.guessed_rate or 0)


def _stream(container: InputContainer, stride: int, offset: int, limit: int | None, name: str) -> Iterator[Clip]:
    stream, chunk, rate = _video_of(container, name)
    held: list[tuple[int, float, Tensor]] = []
    count = taken = damaged = 0
    end = 0.0
    for frame in container.decode(stream):
        when = _seconds(frame, stream, count, rate)
        end = when + (1 / rate if rate else 0.0)
        damaged += frame.is_corrupt
        if count >= offset and (count - offset) % stride == 0 and (limit is None or taken < limit):
            held.append((count, when, _pixels(frame, held)))
            taken += 1
        count += 1
        if len(held) == chunk:
            yield _clip(held, name, rate)
            held = held[:0]
        if taken == limit:
            break
    if held:
        yield _clip(held, name, rate)
    if damaged:
        raise MediaError(f"{damaged} of {count} frames are damaged", where=name, fix="restore or remove it")
    if count == 0:
        raise MediaError("holds no frame", where=name, fix="remove it from the folder")
    if taken != limit:
        _require_whole(container, stream, end, count, rate, name)
    if taken == 0:
        raise ShortMediaError(f"has {count} frames, none at offset {offset}", where=name, fix="use a longer video")


def _pixels(frame: VideoFrame, held: list[tuple[int, float, Tensor]]) -> Tensor:
    """A frame as uint8 `[H, W, 3]`, upright, and of the size of those held before it."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    turned = torch.rot90(pixels, k=round(frame.rotation / 90) % 4, dims=(0, 1))
    if held and held[0][2].shape != turned.shape:
        height, width = held[0][2].shape[:2]
        return torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))
    return turned


def _clip(held: list[tuple[int, float, Tensor]], name: str, rate: float) -> Clip:
    return Clip(
        frames=torch.stack([pixels for _, _, pixels in held]),
        indices=torch.tensor([count for count, _, _ in held]),
        timestamps=torch.tensor([when for _, when, _ in held], dtype=torch.float64),
        source=name,
        rate=rate,
    )


def _seconds(frame: VideoFrame, stream: VideoStream, count: int, rate: float) -> float:
    """When a frame is shown, counted from the start of its stream."""
    if frame.pts is None or stream.time_base is None:
        return count / rate if rate else 0.0
    return float((frame.pts - (stream.start_time or 0)) * stream.time_base)


def _require_whole(
    container: InputContainer, stream: VideoStream, end: float, count: int, rate: float, name: str
) -> None:
    """Refuse a video whose last frame lies well before the length it declares.

    The stream's own length counts where there is one; a container's only where nothing else could be longer.
    """
    declared = None
    if stream.duration is not None and stream.time_base is not None:
        declared = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        declared = container.duration / av.time_base
    slack = max(0.25, 2 / rate if rate else 0.0)
    if declared is not None and end < declared - max(slack, 0.05 * declared):
        raise MediaError(
            f"ends after {end:.1f} s ({count} frames), but declares {declared:.1f} s",
            where=name,
            fix="it was cut off: restore or remove it",
        )


def _require_size(height: int, width: int, *, where: str) -> None:
    if height * width > MAX_PIXELS:
        raise MediaError(
            f"declares {width} x {height} pixels, the limit is {MAX_PIXELS:,}",
            where=where,
            fix="scale it down",
        )
    if min(height, width) < MIN_SIDE:
        raise ShortMediaError(
            f"{width} x {height} pixels, each side needs at least {MIN_SIDE}",
            where=where,
            fix="remove it from the folder",
        )


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """An opened image as uint8 `[H, W, 3]`, upright."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode in GREY_16_BIT:
        deep = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
        grey = ((deep.clip(0, 65535) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(upright.convert("RGB"))


def is_animated(path: Path | OpenFile) -> bool:
    """Whether an image file holds several frames."""
    try:
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return False
