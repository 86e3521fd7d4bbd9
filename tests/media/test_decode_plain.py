"""Videos give the pixels of a plain loop over their frames, whatever is done to be fast."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from conftest import make_video

from toto.media import sample, video
from toto.media.decode import read_media, stream_video
from toto.media.encode import write_video
from toto.runtime.errors import MediaError


def plainly(path, threads="NONE"):
    """All frames as PyAV gives them, and whether any of them is damaged."""
    with av.open(path if isinstance(path, io.BytesIO) else str(path)) as container:
        container.streams.video[0].thread_type = threads
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], any(frame.is_corrupt for frame in frames)


@pytest.mark.parametrize("stride", [1, 4])
def test_pixels_are_those_of_a_plain_loop(tmp_path, stride):
    scene = sample.scenes("heldout")[0]
    for path in (scene, make_video(tmp_path / "v.mp4", size=98)):
        expected = torch.from_numpy(np.stack(plainly(path)[0][::stride]))
        assert read_media(path, stride=stride).frames.equal(expected)
        assert read_media(path, stride=stride, offset=3, limit=5).frames.equal(
            torch.from_numpy(np.stack(plainly(path)[0][3::stride][:5]))
        )


def test_pixels_do_not_depend_on_threads_or_on_how_many_frames_a_clip_has(tmp_path, monkeypatch):
    path = make_video(tmp_path / "v.mp4", size=98)
    expected = read_media(path).frames
    for threads in ("SLICE", "FRAME", "AUTO"):
        assert torch.from_numpy(np.stack(plainly(path, threads)[0])).equal(expected)
    monkeypatch.setattr(video, "PIXELS_AT_ONCE", 98 * 98 * 3)
    monkeypatch.setattr(video, "PIXELS_WORTH_A_THREAD", 0)
    clips = list(stream_video(path))
    assert {len(clip) for clip in clips[:-1]} == {3}
    assert torch.cat([clip.frames for clip in clips]).equal(expected)


def test_rgb_that_needs_no_conversion_is_read_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (2, 21, 33, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "v.mov"), "w") as out:
        stream = out.add_stream("png", rate=5)
        stream.height, stream.width, stream.pix_fmt = 21, 33, "rgb24"
        for each in picture:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        out.mux(stream.encode())
    assert read_media(tmp_path / "v.mov").frames.equal(torch.from_numpy(picture))


def test_a_size_that_changes_is_scaled_to_the_first_ones_in_every_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "PIXELS_AT_ONCE", 48 * 64 * 3)
    for number, (height, width) in enumerate([(48, 64), (96, 80)]):
        with av.open(str(tmp_path / f"{number}.mjpeg"), "w") as out:
            stream = out.add_stream("mjpeg", rate=5)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p"
            for _ in range(7):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((height, width, 3), 90, np.uint8), "rgb24")))
            out.mux(stream.encode())
    content = b"".join((tmp_path / f"{number}.mjpeg").read_bytes() for number in (0, 1))
    (tmp_path / "both.mjpeg").write_bytes(content)
    clips = list(stream_video(tmp_path / "both.mjpeg"))
    assert {tuple(clip.frames.shape[1:]) for clip in clips} == {(48, 64, 3)}
    assert sum(len(clip) for clip in clips) == 14


def test_damage_is_found_on_every_machine(tmp_path):
    """Slice threads, which FFmpeg takes by itself where there are several cores, pass some of these as whole."""
    noise = torch.randint(0, 256, (30, 48, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    write_video(tmp_path / "v.mp4", noise, rate=10)
    content = (tmp_path / "v.mp4").read_bytes()
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(25):
        damaged = bytearray(content)
        damaged[int(rng.integers(2000, len(content)))] ^= 1 << int(rng.integers(8))
        try:
            frames, bad = plainly(io.BytesIO(bytes(damaged)))
        except av.error.FFmpegError:
            continue
        found += bad
        if bad:
            with pytest.raises(MediaError, match="damaged"):
                list(stream_video(io.BytesIO(bytes(damaged))))
        else:
            clips = list(stream_video(io.BytesIO(bytes(damaged))))
            assert torch.cat([clip.frames for clip in clips]).equal(torch.from_numpy(np.stack(frames)))
    assert found > 5
