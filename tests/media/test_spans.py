"""Frames out of the middle of a file are those that decoding from the start gives."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from toto.media import spans
from toto.media.catalog import Item, Seconds
from toto.media.decode import read_media
from toto.media.spans import read_span
from toto.runtime.errors import ShortMediaError


def write_counted(path: Path, *, frames: int, group: int, b_frames: int) -> Path:
    """A video whose frames differ, with key frames every `group` frames."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 200, (6, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(group), "bf": str(b_frames)})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            shown = ground.copy()
            shown[:, number % 60 : number % 60 + 4] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.parametrize(("ending", "group", "b_frames"), [("mp4", 12, 2), ("mkv", 30, 0), ("ts", 25, 3)])
def test_a_span_is_what_decoding_from_the_start_gives(tmp_path, ending, group, b_frames):
    path = write_counted(tmp_path / f"v.{ending}", frames=200, group=group, b_frames=b_frames)
    item = Item(id="v", path=path, kind="video", label=None)
    whole = read_media(path)
    for first, count, stride in ((0, 4, 4), (63, 3, 1), (64, 8, 4), (100, 16, 1), (131, 5, 7), (199, 1, 4)):
        found = read_span(item, first=first, count=count, stride=stride)
        wanted = slice(first, first + (count - 1) * stride + 1, stride)
        assert found.indices.equal(whole.indices[wanted])
        assert found.frames.equal(whole.frames[wanted])
        assert found.timestamps.equal(whole.timestamps[wanted])
    with pytest.raises(ShortMediaError, match=r"2 of 3 frames from frame 190 on at stride 9"):
        read_span(item, first=190, count=3, stride=9)


def test_what_lies_before_a_span_is_jumped_over(tmp_path, monkeypatch):
    item = Item(
        id="v", path=write_counted(tmp_path / "v.mp4", frames=200, group=12, b_frames=2), kind="video", label=None
    )
    whole = read_media(item.path)

    def never(*_args):
        raise AssertionError

    with monkeypatch.context() as without:
        without.setattr(spans, "_stream", never)
        assert read_span(item, first=150, count=4, stride=4).frames.equal(whole.frames[150:163:4])
    monkeypatch.setattr(spans, "read_timeline", lambda *_: None)  # packets that can't be trusted
    assert read_span(item, first=150, count=4, stride=4).frames.equal(whole.frames[150:163:4])


def test_spans_of_windows_and_images_count_from_their_own_start(tmp_path, media_folder):
    path = write_counted(tmp_path / "v.mp4", frames=100, group=12, b_frames=2)
    part = Item(id="w", path=path, kind="video", label=None, part=Seconds(start=1.0, end=3.0))
    assert read_span(part, first=5, count=4, stride=4).indices.tolist() == [30, 34, 38, 42]
    with pytest.raises(ShortMediaError, match="12 of 13 frames"):
        read_span(part, first=5, count=13, stride=4)
    photo = Item(id="p", path=media_folder / "slow" / "photo0.jpg", kind="image", label=None)
    assert read_span(photo, first=0, count=1, stride=4).frames.shape == (1, 48, 80, 3)
