"""Files to clips: images (`toto.media.images`, by Pillow) and videos (`toto.media.video`, by FFmpeg).

What is handled on purpose:

* Frames are counted as they are shown. A stride counts frames, also where the frame rate varies; the timestamps
  say when each one really was.
* Rotation in a video's metadata and EXIF orientation are applied.
* Alpha is laid over white; grey becomes RGB; 16-bit images are scaled to 8 bits, not clipped.
* A frame whose size changes in mid-stream is scaled to the size of the first one that is kept.
* A file that ends before the length it declares, or whose frames the decoder marks as damaged, is corrupt as a whole.
  Of a file that is read in windows, those are corrupt that the damage touches.
* Sizes are bounded before memory is taken: `toto.media.limits`.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import torch

from toto.media.clip import Clip
from toto.media.images import OpenFile, declared_size, format_of, is_animated, read_image
from toto.media.sampling import require_frames
from toto.media.video import Ended, Event, Kept, gather, open_video
from toto.media.windows import Window, window_events
from toto.runtime.errors import MediaError, ShortMediaError
from toto.runtime.remote import RemotePath

__all__ = [
    "IMAGE_ENDINGS",
    "VIDEO_ENDINGS",
    "Kind",
    "OpenFile",
    "Window",
    "codec_of",
    "declared_size",
    "is_animated",
    "media_kind",
    "read_clip",
    "read_image",
    "read_media",
    "stream_video",
    "stream_windows",
]

Kind = Literal["image", "video"]

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


def media_kind(path: PurePath | RemotePath) -> Kind | None:
    """Whether a file is an image or a video by its ending; None where it is neither.

    A GIF is a video where it has several frames.
    """
    ending = path.suffix.lower()
    if ending == ".gif":
        place = io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else Path(path)
        return "video" if is_animated(place) else "image"
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


def stream_video(
    path: Path | OpenFile, *, stride: int = 1, offset: int = 0, limit: int | None = None, source: str | None = None
) -> Iterator[Clip]:
    """Frames `offset, offset + stride, ...` of a video (a file, or an open one) in consecutive clips of bounded size.

    Memory stays flat however long the video is: a clip has at most 32 frames or 4 megapixels (or one frame).
    See `read_media` for the errors; damage is raised after the clips before it.
    """
    name = source or str(path)
    for _, clip in gather(_kept_frames(path, stride, offset, limit, name), name):
        if isinstance(clip, MediaError):
            raise clip
        yield clip


def stream_windows(
    path: Path | OpenFile, windows: Sequence[Window], *, stride: int = 1, source: str | None = None
) -> Iterator[tuple[int, Clip | MediaError]]:
    """Several windows of one video in one pass over it, whether they overlap or not; frames are decoded once.

    What lies before and between windows is jumped over where the file allows it; the frames are the same.

    Args:
        path: the file, or an open one (which is read from its start).
        windows: what to read.
        stride: every `stride`-th frame of a window is kept, counted from its own first frame.
        source: the clips' source id.

    Yields:
        The number of a window, with a clip of its next frames, of bounded size; or with what is wrong with it, after
        which nothing more of it comes. What happens outside of a window is nothing to it.
    """
    name = source or str(path)
    yield from gather(window_events(path, windows, stride, name), name)


def codec_of(path: Path | OpenFile, kind: Kind, *, source: str | None = None) -> str:
    """The codec of a video ("h264"), the format of an image ("jpeg"); "unknown" where nobody can tell."""
    if kind == "image":
        return format_of(path) or "unknown"
    try:
        with open_video(path, source or str(path)) as video:
            return video.stream.codec_context.name
    except MediaError:
        return "unknown"


@dataclass(kw_only=True)
class _Counts:
    frames: int = 0
    taken: int = 0
    damaged: int = 0
    end: float = 0.0


def _kept_frames(
    path: Path | OpenFile, stride: int, offset: int, limit: int | None, name: str
) -> Generator[Event, None, None]:
    """The frames that are kept, as reader 0, and whether the file is whole as far as it was read."""
    counts = _Counts()
    with open_video(path, name) as video:
        for frame in video.frames():
            when = video.seconds(frame.pts, counts.frames)
            counts.damaged += frame.is_corrupt
            if counts.frames >= offset and (counts.frames - offset) % stride == 0:
                yield Kept(readers=(0,), index=counts.frames, when=when, frame=frame, rate=video.rate)
                counts.taken += 1
            counts.frames += 1
            counts.end = when + video.step
            if counts.taken == limit:
                break
        if not counts.damaged and counts.taken != limit:
            video.require_whole(counts.end, counts.frames)
    yield Ended(reader=0)
    if counts.damaged:
        reason = f"{counts.damaged} of {counts.frames} frames are damaged"
        raise MediaError(reason, where=name, fix="restore or remove it")
    if counts.taken == 0:
        reason = f"has {counts.frames} frames, none at offset {offset}"
        raise ShortMediaError(reason, where=name, fix="use a longer video")
