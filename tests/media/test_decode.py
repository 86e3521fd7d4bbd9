"""Decoding: what comes out of every kind of file, and the error for those that can't be used."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import make_photo, make_video
from PIL import Image

from toto.media.decode import media_kind, read_clip, read_image, read_media, stream_video
from toto.media.encode import write_gif, write_video
from toto.runtime.errors import MediaError, ShortMediaError


def numbered_video(path: Path, *, frames=30, size=(48, 64), codec="libx264", rate=10, pts=None, options=None):
    """A video whose frame i is a flat grey of level 8 i, in any container that the ending names."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = options or {}
        stream.codec_context.time_base = Fraction(1, rate)
        for number in range(frames):
            picture = np.full((*size, 3), 8 * number % 256, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def levels(clip):
    return (clip.frames.float().mean(dim=(1, 2, 3)) / 8).round().int().tolist()


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("mov", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx-vp9")],
)
def test_every_container_gives_the_frames_that_were_asked_for(tmp_path, ending, codec):
    path = numbered_video(tmp_path / f"v.{ending}", codec=codec)
    clip = read_media(path, stride=4, offset=1)
    assert levels(clip) == list(range(1, 30, 4))
    assert clip.indices.tolist() == list(range(1, 30, 4))
    torch.testing.assert_close(clip.timestamps, clip.indices.double() / 10, atol=0.011, rtol=0)
    assert clip.rate == pytest.approx(10)
    assert levels(read_media(path, stride=4, limit=3)) == [0, 4, 8]


def test_streaming_gives_the_same_frames_in_bounded_clips(tmp_path):
    path = numbered_video(tmp_path / "v.mp4", frames=100)
    clips = list(stream_video(path))
    assert max(len(clip) for clip in clips) <= 32
    assert torch.cat([clip.frames for clip in clips]).equal(read_media(path).frames)


def test_a_variable_frame_rate_keeps_every_frame_and_its_true_time(tmp_path):
    pts = [0, 1, 2, 7, 8, 20, 21, 30]
    clip = read_media(numbered_video(tmp_path / "v.mkv", frames=8, pts=pts))
    assert levels(clip) == list(range(8))
    torch.testing.assert_close(clip.timestamps, torch.tensor(pts).double() / 10, atol=0.002, rtol=0)


def test_odd_sizes_are_decoded_whole(tmp_path):
    path = numbered_video(tmp_path / "v.mkv", frames=4, size=(45, 61), codec="ffv1")
    assert read_media(path).frames.shape == (4, 45, 61, 3)


def test_rotation_in_the_metadata_is_applied(tmp_path):
    picture = torch.zeros(6, 48, 64, 3, dtype=torch.uint8)
    picture[:, :24] = 255  # bright above
    path = tmp_path / "v.mp4"
    write_video(path, picture, rate=6)
    content = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)  # show it turned clockwise
    place = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:place] + quarter + content[place + 36 :])
    frames = read_media(path).frames.float()
    assert frames.shape == (6, 64, 48, 3)
    assert frames[:, :, 24:].mean() > 200 > 50 > frames[:, :, :24].mean()


def test_a_truncated_video_is_corrupt_in_every_container(tmp_path):
    for ending, codec in (("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4")):
        noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
        path = tmp_path / f"v.{ending}"
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for picture in noise:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
        assert len(read_media(path)) == 60
        content = path.read_bytes()
        for share in (0.3, 0.7):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(MediaError):
                read_media(path)
    write_video(tmp_path / "fast.mp4", torch.from_numpy(noise), rate=10)  # its index comes first
    content = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "fast.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(MediaError, match=r"declares 6\.0 s|damaged|can't be decoded"):
        read_media(tmp_path / "fast.mp4")


def test_files_that_are_no_video_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("no video\n" * 1000)
    (tmp_path / "empty.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    for name in ("text", "empty", "sound"):
        with pytest.raises(MediaError) as error:
            read_media(tmp_path / f"{name}.mp4")
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    with pytest.raises(MediaError, match="no such file"):
        read_media(tmp_path / "nowhere.mp4")
    with pytest.raises(MediaError, match="neither an image nor a video"):
        read_media(make_photo(tmp_path / "a.jpg").rename(tmp_path / "a.doc"))


def test_a_video_that_declares_a_huge_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("toto.media.limits.MAX_VIDEO_PIXELS", 48 * 64 - 1)
    with pytest.raises(MediaError, match="declares 64 x 48 pixels"):
        read_media(numbered_video(tmp_path / "v.mp4", frames=2))


def test_a_video_shorter_than_the_span_says_what_it_has_and_needs(tmp_path):
    path = numbered_video(tmp_path / "v.mp4", frames=30)
    assert levels(read_clip(path, frames=8, stride=4)) == list(range(0, 29, 4))
    with pytest.raises(ShortMediaError, match="16 frames at stride 4 cover 61"):
        read_clip(path, frames=16, stride=4)
    with pytest.raises(ShortMediaError, match="none at offset 40"):
        read_media(path, offset=40)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 10, 20))  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    picture.save(tmp_path / "a.png", exif=exif)
    frames = read_image(tmp_path / "a.png").frames
    assert frames.shape == (1, 40, 20, 3)
    assert frames[0, :10].float().mean() > 250 > 5 > frames[0, 11:].float().mean()


def test_alpha_lies_over_white(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").frames.unique().tolist() == [255]
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").frames.unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    ending = "tif" if mode == "CMYK" else "png"
    grey = Image.new("RGB", (16, 12), (120, 120, 120))
    (grey.quantize() if mode == "P" else grey.convert(mode)).save(tmp_path / f"a.{ending}")
    frames = read_image(tmp_path / f"a.{ending}").frames
    assert frames.shape == (1, 12, 16, 3)
    if mode != "1":
        assert (frames.float() - 120).abs().max() <= 3


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").frames[0, :, :, 0].flatten().tolist() == list(range(256))


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((16, 16), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="no agreed range"):
        read_image(tmp_path / "a.tif")


def test_a_header_of_60000_by_60000_is_refused_before_memory_is_taken(tmp_path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match="pixels"):
        read_image(tmp_path / "a.png")


def test_small_and_damaged_images(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    with pytest.raises(ShortMediaError, match="1 x 1 pixels"):
        read_image(tmp_path / "dot.png")
    path = make_photo(tmp_path / "a.jpg", height=200, width=200)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(MediaError, match="truncated"):
        read_image(path)
    (tmp_path / "t.jpg").write_text("text")
    with pytest.raises(MediaError, match="not an image"):
        read_image(tmp_path / "t.jpg")


def test_a_gif_is_a_video_where_it_moves(tmp_path):
    moving = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    write_gif(tmp_path / "moves.gif", moving, rate=10)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "still.gif")
    assert media_kind(tmp_path / "moves.gif") == "video"
    assert media_kind(tmp_path / "still.gif") == "image"
    assert len(read_media(tmp_path / "moves.gif")) == 5
    assert len(read_media(tmp_path / "still.gif")) == 1


def test_bits_that_flip_never_escape_as_another_error(tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=12)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 20):
            damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            clip = read_media(path)
        except MediaError:
            continue
        assert clip.frames.dtype == torch.uint8
