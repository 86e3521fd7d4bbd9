"""The views of a video that are tested: clips spread over its length, each cut in three places.

The protocol is SlowFast's (facebookresearch/SlowFast, slowfast/datasets: `get_start_end_idx` and `temporal_sampling`
in decoder.py, `uniform_crop` in transform.py). Of a video of F frames, with T frames at stride s in a clip:

    span   T x s frames (x the video's rate / `fps`, where that is given)
    start  of clip i of K: max(F - span, 0) x i / K, so that the last clip ends before the video does
    frames T points from start to start + span - 1, evenly spaced, rounded down, never beyond the last frame

So the frames of a clip lie a little further apart than the stride (63 / 15 = 4.2 for 16 frames at stride 4), and a
video that is shorter than the span repeats its last frame. The shorter side becomes the crop's size, and the crops lie
at both ends and in the middle of the longer one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.media.catalog import Item
from toto.media.reading import read_item, stream_item
from toto.media.sampling import clip_indices
from toto.media.timeline import read_timeline
from toto.media.transforms import Box, resized_crop
from toto.media.video import open_video
from toto.runtime.errors import ConfigError, MediaError

Spacing = Literal["slowfast", "stride"]


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Which views of a video are tested; their scores are averaged after the softmax.

    Attributes:
        clips: K, spread over the video. Of an image there is one.
        crops: 3 along the longer side, or 1 in the middle.
        spacing: "slowfast" places the frames of a clip as its decoder does; "stride" takes every s-th one exactly, as
            pre-training does, from the same starts.
        fps: frames a second that the stride is meant at; None counts frames, at whatever rate they were taken.
    """

    clips: int = 10
    crops: Literal[1, 3] = 3
    spacing: Spacing = "slowfast"
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.clips < 1:
            raise ConfigError(f"must be at least 1, is {self.clips}", where="--views.clips")
        if self.fps is not None and not self.fps > 0:
            raise ConfigError(f"must be positive, is {self.fps}", where="--views.fps")

    @property
    def name(self) -> str:
        """Clips x crops, as tables say it: "10 x 3"."""
        return f"{self.clips} x {self.crops}"


def clip_start(frame_count: int, span: float, clip: int, clips: int) -> float:
    """Where clip number `clip` of `clips` begins, in frames.

    >>> clip_start(300, 64, 5, 10)
    118.0
    """
    return max(frame_count - span, 0) * clip / clips


def view_indices(
    frame_count: int, *, frames: int, stride: int, clip: int, config: ViewConfig, rate: float = 0.0
) -> list[int]:
    """The numbers of a clip's frames in a video of `frame_count` frames, `frames` of them; the last may be repeated.

    Args:
        frame_count: of the video, at least 1.
        frames: T.
        stride: s.
        clip: 0 .. config.clips - 1.
        config: how they are chosen.
        rate: frames a second of the video; 0 where nobody knows it, which counts as `config.fps`.
    """
    scale = rate / config.fps if config.fps and rate else 1.0
    span = frames * stride * scale
    start = clip_start(frame_count, span, clip, config.clips)
    last = frame_count - 1
    if config.spacing == "slowfast":
        points = torch.linspace(start, start + span - 1, frames).clamp(0, last)
        return [int(point) for point in points.tolist()]
    step = max(1, round(stride * scale))
    return [min(index, last) for index in clip_indices(int(start), frames, step)]


def scaled_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after the shorter side became `size`; the longer one is rounded down.

    >>> scaled_size(720, 1280, 128)
    (128, 227)
    """
    if height == width:
        return size, size
    if width < height:
        return math.floor(float(height) / width * size), size
    return size, math.floor(float(width) / height * size)


def crop_boxes(height: int, width: int, size: int, crops: Literal[1, 3]) -> list[Box]:
    """The crops of frames whose shorter side is `size`: left, centre, right, or top, centre, bottom where they stand.

    The centre is rounded up, towards the bottom right.
    """
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    centre = Box(top=top, left=left, height=size, width=size)
    if crops == 1:
        return [centre]
    if height > width:
        places = [(0, left), (top, left), (height - size, left)]
    else:
        places = [(top, 0), (top, left), (top, width - size)]
    return [Box(top=top, left=left, height=size, width=size) for top, left in places]


@dataclass(frozen=True, kw_only=True)
class Length:
    """How many frames an item has, and how many a second (0: an image, or nobody knows)."""

    frames: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Views:
    """What is tested of an item.

    Attributes:
        frames: uint8 `[V, T, size, size, 3]`, the crops of the first clip first.
        repeated: whether the item was shorter than a clip, so that its last frame was repeated.
    """

    frames: UInt8[Tensor, "V T H W 3"]
    repeated: bool


def length_of(item: Item) -> Length:
    """How long an item is: told by its packets where they can be trusted, else by decoding it.

    Raises:
        MediaError: it can't be read.
    """
    if item.kind == "image":
        return Length(frames=1, rate=0.0)
    if item.part is None and isinstance(item.path, Path):
        timeline = read_timeline(item.path, None)
        if timeline is not None:
            with open_video(item.path, item.id) as video:
                return Length(frames=len(timeline.pts), rate=video.rate)
    count, rate = 0, 0.0
    for clip in stream_item(item):
        count, rate = count + len(clip), clip.rate
    return Length(frames=count, rate=rate)


def read_views(item: Item, config: ViewConfig, *, frames: int, stride: int, size: int) -> Views:
    """The views of a video, or of an image, in one pass over it; in memory are those frames alone that a clip takes.

    Args:
        item: what is read, to its end, so that one that was cut off is found.
        config: which views.
        frames: T; of an image, 1.
        stride: s.
        size: of the crops.

    Raises:
        MediaError: it can't be read, or is damaged.
    """
    if item.kind == "image":
        return Views(frames=torch.stack(_crops(read_item(item).frames, size, config.crops)), repeated=False)
    length = length_of(item)
    clips = [
        view_indices(length.frames, frames=frames, stride=stride, clip=clip, config=config, rate=length.rate)
        for clip in range(config.clips)
    ]
    wanted = {index for clip in clips for index in clip}
    found: dict[int, list[Tensor]] = {}
    number = 0
    for part in stream_item(item):
        places = [place for place in range(len(part)) if number + place in wanted]
        if places:
            cut = _crops(part.frames[places], size, config.crops)
            for place, each in zip(places, zip(*cut, strict=True), strict=True):
                found[number + place] = list(each)
        number += len(part)
    if missing := wanted - found.keys():
        reason = f"its packets tell of {length.frames} frames, and frame {min(missing)} doesn't come"
        raise MediaError(reason, where=item.id, fix="restore or remove it")
    views = [torch.stack([found[index][crop] for index in clip]) for clip in clips for crop in range(config.crops)]
    return Views(frames=torch.stack(views), repeated=any(len(set(clip)) < frames for clip in clips))


def _crops(frames: UInt8[Tensor, "T H W 3"], size: int, crops: Literal[1, 3]) -> list[Tensor]:
    height, width = scaled_size(frames.shape[1], frames.shape[2], size)
    boxes = crop_boxes(height, width, size, crops)
    if crops == 1:
        return [resized_crop(frames, height, width, boxes[0])]
    return [resized_crop(frames, height, width, box) for box in boxes]
