"""Views of a video: SlowFast's published formula, worked out here by itself, and what is really read."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import make_photo, make_video

from toto.evaluation.views import ViewConfig, clip_start, crop_boxes, length_of, read_views, scaled_size, view_indices
from toto.media.catalog import Item, Seconds
from toto.media.reading import read_item
from toto.media.transforms import resize
from toto.runtime.errors import ConfigError, MediaError


def published(video: int, frames: int, span: float, clip: int, clips: int) -> list[int]:
    """The formula in words of its decoder: start = delta i / K, T points to start + span - 1, clamped, cut off."""
    delta = max(video - span, 0)
    start = delta * clip / clips
    index = torch.linspace(start, start + span - 1, frames)
    return torch.clamp(index, 0, video - 1).long().tolist()


def exactly(video: int, frames: int, span: int, clip: int, clips: int) -> list[Fraction]:
    """The same points as fractions, before they are cut off."""
    start = Fraction(max(video - span, 0) * clip, clips)
    gap = Fraction(span - 1, max(1, frames - 1))
    return [min(start + place * gap, Fraction(video - 1)) for place in range(frames)]


@pytest.mark.parametrize("video", [1, 2, 15, 16, 17, 61, 63, 64, 65, 74, 250, 300, 301])
@pytest.mark.parametrize(("frames", "stride"), [(16, 4), (8, 8), (4, 1), (1, 4)])
@pytest.mark.parametrize("clips", [1, 3, 10])
def test_clips_lie_where_the_published_formula_puts_them(video, frames, stride, clips):
    config = ViewConfig(clips=clips)
    for clip in range(clips):
        ours = view_indices(video, frames=frames, stride=stride, clip=clip, config=config)
        assert ours == published(video, frames, frames * stride, clip, clips)
        for index, point in zip(ours, exactly(video, frames, frames * stride, clip, clips), strict=True):
            assert index == math.floor(point) or (point.denominator == 1 and index == point - 1)  # rounded in fp32
        assert len(ours) == frames
        assert min(ours) >= 0
        assert max(ours) < video


def test_starts_and_frames_of_the_paper_s_clips():
    assert [clip_start(300, 64, clip, 10) for clip in (0, 1, 9)] == [0, 23.6, 212.4]
    first = view_indices(300, frames=16, stride=4, clip=0, config=ViewConfig())
    assert first == [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]  # 4.2 apart
    strided = view_indices(300, frames=16, stride=4, clip=9, config=ViewConfig(spacing="stride"))
    assert strided == list(range(212, 276, 4))
    assert view_indices(1, frames=16, stride=4, clip=7, config=ViewConfig()) == [0] * 16
    short = view_indices(20, frames=16, stride=4, clip=9, config=ViewConfig())
    assert short == [0, 4, 8, 12, 16] + [19] * 11


def test_a_stride_in_seconds_covers_more_frames_of_a_faster_video():
    config = ViewConfig(fps=30)
    at_30 = view_indices(600, frames=16, stride=4, clip=0, config=config, rate=30)
    at_60 = view_indices(600, frames=16, stride=4, clip=0, config=config, rate=60)
    assert at_30 == published(600, 16, 64, 0, 10)
    assert at_60 == published(600, 16, 128, 0, 10)
    assert view_indices(600, frames=16, stride=4, clip=3, config=config) == published(600, 16, 64, 3, 10)


@pytest.mark.parametrize(
    ("height", "width"),
    [(720, 1280), (1280, 720), (240, 320), (340, 256), (256, 256), (128, 128), (100, 101), (31, 90)],
)
@pytest.mark.parametrize("size", [128, 224, 256])
def test_crops_lie_where_uniform_crop_puts_them(height, width, size):
    tall = width < height
    scaled = scaled_size(height, width, size)
    long = math.floor(float(max(height, width)) / min(height, width) * size)
    assert scaled == ((long, size) if tall else (size, long))
    boxes = crop_boxes(*scaled, size, 3)
    middle = math.ceil((long - size) / 2)
    expected = [0, middle, long - size]
    assert [(box.top, box.left) for box in boxes] == [(p, 0) if tall else (0, p) for p in expected]
    assert crop_boxes(*scaled, size, 1) == [boxes[1]]
    assert all((box.height, box.width) == (size, size) for box in boxes)


def test_ten_by_three_views_are_the_decoded_frames_in_their_places(tmp_path):
    path = make_video(tmp_path / "a" / "v.mp4", frames=50, size=48)
    item = Item(id="v", path=path, kind="video", label=None)
    assert length_of(item).frames == 50
    views = read_views(item, ViewConfig(), frames=4, stride=3, size=32)
    assert views.frames.shape == (30, 4, 32, 32, 3)
    assert not views.repeated
    whole = resize(read_item(item).frames, 32, 32)
    for clip in range(10):
        wanted = view_indices(50, frames=4, stride=3, clip=clip, config=ViewConfig())
        torch.testing.assert_close(views.frames[3 * clip + 1], whole[wanted])


def test_short_videos_windows_and_images_have_views_too(tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=24, size=32, rate=12)
    item = Item(id="v", path=path, kind="video", label=None)
    assert read_views(item, ViewConfig(clips=2), frames=16, stride=4, size=32).repeated
    window = Item(id="w", path=path, kind="video", label=None, part=Seconds(start=1.0, end=2.0))
    assert length_of(window).frames == 12
    seen = read_views(window, ViewConfig(clips=1, crops=1, spacing="stride"), frames=3, stride=2, size=32)
    torch.testing.assert_close(seen.frames[0], read_item(item).frames[[12, 14, 16]])
    photo = Item(id="p", path=make_photo(tmp_path / "p.jpg"), kind="image", label=None)
    left, centre, right = read_views(photo, ViewConfig(), frames=1, stride=4, size=24).frames
    assert left.shape == (1, 24, 24, 3)
    assert not torch.equal(left, centre)
    assert not torch.equal(centre, right)
    assert len(read_views(photo, ViewConfig(crops=1), frames=1, stride=4, size=24).frames) == 1


def test_a_video_that_was_cut_off_is_corrupt_and_odd_options_are_refused(tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=60, size=64)
    Path(path).write_bytes(path.read_bytes()[:-2500])
    with pytest.raises(MediaError):
        read_views(Item(id="v", path=path, kind="video", label=None), ViewConfig(), frames=4, stride=4, size=32)
    with pytest.raises(ConfigError, match="at least 1"):
        ViewConfig(clips=0)
    with pytest.raises(ConfigError, match="must be positive"):
        ViewConfig(fps=-1)
