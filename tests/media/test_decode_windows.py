"""Windows that are sought in a file are those that decoding from the start gives."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toto.media import timeline, windows
from toto.media.decode import Window, read_media, stream_windows
from toto.runtime.errors import MediaError

FRAMES = 150
RATE = 25
UNEVEN = np.cumsum(np.random.default_rng(5).integers(1, 5, FRAMES)).tolist()
FILES = {
    "closed.mp4": ("libx264", {"g": "12", "bf": "3"}, None),
    "open.mp4": ("libx264", {"g": "20", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal"}, None),
    "long.mkv": ("libx264", {"g": "60", "bf": "2"}, None),
    "open.mkv": ("libx264", {"g": "15", "bf": "2", "x264-params": "open-gop=1"}, None),
    "uneven.mp4": ("libx264", {"g": "15", "bf": "2"}, UNEVEN),
    "uneven.mkv": ("libx264", {"g": "15", "bf": "3"}, UNEVEN),
    "broadcast.ts": ("libx264", {"g": "16", "bf": "2"}, None),
    "open.ts": ("libx264", {"g": "16", "bf": "3", "x264-params": "open-gop=1"}, None),
    "refresh.ts": ("libx264", {"g": "20", "bf": "0", "x264-params": "intra-refresh=1"}, None),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=20:open-gop=1:log-level=error"}, None),
    "one.webm": ("libvpx-vp9", {"g": "16", "deadline": "realtime", "cpu-used": "8"}, None),
    "old.avi": ("mpeg4", {"g": "12", "bf": "2"}, None),
    "old.mpg": ("mpeg2video", {"g": "12", "bf": "2"}, None),
}


def moving_noise(path, codec, options, pts):
    rng = np.random.default_rng(3)
    ground = rng.integers(0, 256, (48, 64 + 2 * FRAMES, 3), dtype=np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.options = options
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ground[:, 2 * number :][:, :64]), format="rgb24")
            frame.pts, frame.time_base = number if pts is None else pts[number], Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    return {name: moving_noise(folder / name, *how) for name, how in FILES.items() if how[0] in av.codecs_available}


@pytest.fixture
def eager(monkeypatch):
    """Every gap is worth a jump; returns the key frames that were jumped to."""
    jumps = []
    seek = timeline.frames_from

    def counted(video, line, key):
        jumps.append(key)
        return seek(video, line, key)

    monkeypatch.setattr(windows, "SKIP_SECONDS", 0.0)
    monkeypatch.setattr(windows, "SKIP_FRAMES", 2)
    monkeypatch.setattr(windows, "frames_from", counted)
    return jumps


def outcomes(path, wanted, stride):
    """Of every window its frames, numbers and times, or what is wrong with it."""
    got = {number: [] for number in range(len(wanted))}
    for number, made in stream_windows(path, wanted, stride=stride):
        got[number].append(made)
    found = []
    for made in got.values():
        errors = [str(each) for each in made if isinstance(each, MediaError)]
        clips = [each for each in made if not isinstance(each, MediaError)]
        fields = (
            [torch.cat([getattr(clip, name) for clip in clips]) for name in ("frames", "indices", "timestamps")]
            if clips
            else []
        )
        found.append((errors, fields))
    return found


def assert_same(found, expected):
    for (errors, fields), (other_errors, other_fields) in zip(found, expected, strict=True):
        assert errors == other_errors
        assert len(fields) == len(other_fields)
        assert all(one.equal(other) for one, other in zip(fields, other_fields, strict=True))


def plainly(path, wanted, stride):
    """The same with decoding from the start."""
    read = windows.read_timeline
    windows.read_timeline = lambda path, until: None
    try:
        return outcomes(path, wanted, stride)
    finally:
        windows.read_timeline = read


seconds = st.integers(0, 700).map(lambda hundredths: hundredths / 100)
some_windows = st.lists(
    st.builds(
        lambda start, length, offset: Window(
            start=start, end=None if length is None else start + length, offset=offset
        ),
        seconds,
        st.none() | st.integers(1, 200).map(lambda hundredths: hundredths / 100),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=some_windows, stride=st.integers(1, 4))
def test_windows_are_the_same_with_and_without_jumps(files, eager, name, wanted, stride):
    if name not in files:
        pytest.skip("this build of FFmpeg has no such encoder")
    assert_same(outcomes(files[name], wanted, stride), plainly(files[name], wanted, stride))


@pytest.mark.parametrize("name", ["closed.mp4", "open.mkv", "uneven.mp4", "broadcast.ts"])
def test_gaps_are_jumped_over(files, eager, name):
    whole = read_media(files[name])
    ends = whole.timestamps[[60, 70, 130, 140]].tolist()
    wanted = [Window(start=ends[0], end=ends[1]), Window(start=ends[2], end=ends[3])]
    found = outcomes(files[name], wanted, 1)
    assert len(eager) == 2
    for (errors, (frames, indices, _)), first in zip(found, (60, 130), strict=True):
        assert not errors
        assert indices.tolist() == list(range(first, first + 10))
        assert frames.equal(whole.frames[first : first + 10])


def test_the_timeline_says_when_every_frame_is_shown(files):
    for name in ("open.mp4", "long.mkv", "uneven.mkv", "broadcast.ts"):
        line = timeline.read_timeline(files[name], None)
        assert line is not None
        assert line.whens.tolist() == read_media(files[name]).timestamps.tolist()
        assert line.keys[0] == 0
        assert line.key_before(FRAMES + 10) == line.keys[-1]
        some = timeline.read_timeline(files[name], 2.0)
        assert some is not None
        assert len(some.pts) < FRAMES
        assert some.first_at(1.9) == line.first_at(1.9)


def test_packets_without_times_are_not_trusted(tmp_path):
    path = moving_noise(tmp_path / "v.h264", "libx264", {"g": "12", "bf": "2"}, None)
    assert timeline.read_timeline(path, None) is None
    assert timeline.read_timeline(tmp_path / "nowhere.mp4", None) is None


def test_a_seek_that_misleads_ends_in_decoding_from_the_start(files, eager, monkeypatch):
    path = files["closed.mp4"]
    wanted = [Window(start=0.0, end=0.4), Window(start=3.0, end=3.6), Window(start=5.0, end=None)]
    expected = plainly(path, wanted, 2)
    seek = windows.frames_from

    def one_is_missing(video, line, key):
        for place, frame in enumerate(seek(video, line, key)):
            if place != 5:
                yield frame

    monkeypatch.setattr(windows, "frames_from", one_is_missing)
    assert_same(outcomes(path, wanted, 2), expected)
    assert eager


def test_damage_that_is_jumped_over_is_nothing_to_a_window(files, tmp_path):
    content = bytearray(files["closed.mp4"].read_bytes())
    with av.open(str(files["closed.mp4"])) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in packets[20:24]:
        content[place + 8 : place + size] = bytes(size - 8)
    (tmp_path / "hit.mp4").write_bytes(content)
    early, late = Window(start=0.8, end=1.0), Window(start=4.0, end=4.8)
    (errors, fields), *_ = outcomes(tmp_path / "hit.mp4", [late], 1)
    assert not errors
    assert fields[1].tolist() == list(range(100, 120))
    assert fields[0].equal(read_media(files["closed.mp4"]).frames[100:120])
    assert outcomes(tmp_path / "hit.mp4", [early], 1)[0][0]
