"""Which frames: pure integer arithmetic, nothing is opened here.

The paper takes every 4th frame, 16 of them (section 3). At stride 4 and T = 4, from frame 2 of a video of 16:

    frame   0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5
    taken       x       x       x       x       start = 2, stride = 4, T = 4
                |<--- span of 13 -->|           (T - 1) * stride + 1 frames, both ends included
    starts  0 1 2 3                             16 - 13 + 1 = 4 possible starts
"""

from __future__ import annotations

from toto.runtime.errors import ShortMediaError


def span(length: int, stride: int) -> int:
    """How many source frames a clip of `length` frames at `stride` covers, both ends included."""
    return (length - 1) * stride + 1


def start_count(frame_count: int, length: int, stride: int) -> int:
    """How many starts a clip has in a source of `frame_count` frames; 0 where the source is too short."""
    return max(0, frame_count - span(length, stride) + 1)


def clip_indices(start: int, length: int, stride: int) -> list[int]:
    """Source frame numbers of the clip that starts at `start`."""
    return [start + position * stride for position in range(length)]


def strided_count(frame_count: int, stride: int, offset: int = 0) -> int:
    """How many frames `offset, offset + stride, ...` a source of `frame_count` frames has."""
    return max(0, -(-(frame_count - offset) // stride))


def tiling(frame_count: int, length: int) -> tuple[int, int]:
    """Cut a row of frames into windows that don't overlap.

    Returns:
        How many windows of `length` fit, and how many frames are then left over: the first window may start at
        0 .. left over.
    """
    windows = frame_count // length
    return windows, frame_count - windows * length


def require_frames(frame_count: int, length: int, stride: int, *, where: str) -> None:
    """Refuse a source that is shorter than the span."""
    if start_count(frame_count, length, stride) == 0:
        needed = span(length, stride)
        raise ShortMediaError(
            f"{frame_count} frames, but {length} frames at stride {stride} cover {needed}",
            where=where,
            fix="use a longer video, fewer frames or a smaller stride",
        )
