"""Small files that declare much: refused by size in one line, or decoded within a bound of memory."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from toto.media import limits
from toto.media.decode import stream_video
from toto.runtime.errors import MediaError

LARGE = 5_000, 4_000
MEASURE = """
import json, sys
from pathlib import Path
import torch
from toto.media.decode import media_kind, read_image, stream_video
from toto.runtime.errors import MediaError

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

torch.set_num_threads(1)
read_image(Path(sys.argv[1]))
list(stream_video(Path(sys.argv[2])))
for name in sys.argv[3:]:
    Path("/proc/self/clear_refs").write_text("5")
    before, path, said = peak(), Path(name), "read"
    try:
        if media_kind(path) == "image":
            read_image(path)
        else:
            for clip in stream_video(path):
                pass
    except MediaError as error:
        said = str(error)
    print(json.dumps([path.name, said, peak() - before]))
"""


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *, depth=8, colour=2, extra=b"", data=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", data or zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def flat_png(width, height, *, depth=8, colour=2):
    """A picture of one colour that is a thousand times smaller than its pixels."""
    row = b"\0" * (1 + width * depth // 8 * {0: 1, 2: 3, 6: 4}[colour])
    packer = zlib.compressobj()
    return png(width, height, depth=depth, colour=colour, data=packer.compress(row * height) + packer.flush())


def apng(width, height):
    control = png_chunk(b"acTL", struct.pack(">II", 60_000, 0))
    frame = png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, width, height, 0, 0, 1, 10, 0, 0))
    return png(width, height, extra=control + frame)


def gif(width, height, frames):
    header = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return header + frame * frames + b"\x3b"


def tiff(width, height):
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 50)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return content.ljust(200, b"\0") + zlib.compress(b"\0" * 10_000)


def webp(width, height):
    """A lossless picture whose header declares so many pixels."""
    bits = (width - 1) | (height - 1) << 14
    data = b"\x2f" + struct.pack("<I", bits) + b"\0" * 32
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def video(path, height, width, frames=2, codec="mjpeg"):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(frames):
            picture = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path.read_bytes()


def y4m(width, height):
    return f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420jpeg\nFRAME\n".encode() + b"\0" * 1000


def declaring(content, first, second):
    """The same bytes with 16384 x 16384 where a header has these two sides."""
    before = struct.pack(">HH", first, second)
    assert before in content
    return content.replace(before, struct.pack(">HH", 16_384, 16_384))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What is said of every bomb, and the megabytes that it took, in a process of its own."""
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "warm.png").write_bytes(flat_png(64, 64))
    video(folder / "warm.mp4", 64, 64, codec="libx264")
    film = video(folder / "film.avi", 48, 64, codec="rawvideo")
    text = zlib.compress(b"\0" * 100_000_000)
    bombs = {
        "wide.png": png(60_000, 60_000),
        "huge.png": png(2**31 - 1, 2**31 - 1),
        "text.png": png(64, 64, extra=png_chunk(b"zTXt", b"bomb\0\0" + text)),
        "profile.png": png(64, 64, extra=png_chunk(b"iCCP", b"bomb\0\0" + text)),
        "moving.apng": apng(60_000, 60_000),
        "still.gif": gif(65_535, 65_535, 1),
        "moving.gif": gif(65_535, 65_535, 50),
        "wide.tif": tiff(100_000, 100_000),
        "wide.webp": webp(16_384, 16_384),
        "wide.y4m": y4m(16_384, 16_384),
        "wide.avi": film.replace(struct.pack("<II", 64, 48), struct.pack("<II", 16_384, 16_384)),
        "wide.mjpeg": declaring(video(folder / "film.mjpeg", 48, 64), 48, 64),
        "lying.mp4": declaring(video(folder / "film.mp4", 48, 64, codec="mpeg4"), 64, 48),
        "large.png": flat_png(*LARGE),
        "deep.png": flat_png(*LARGE, depth=16, colour=0),
        "clear.png": flat_png(*LARGE, colour=6),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60000 60000\n%%EndComments\nshowpage\n",
        "packed.svgz": gzip.compress(b"<svg/>" * 1000),
    }
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (64, 64)).save(
        folder / "many.tif", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 500
    )
    (folder / "many.gif").write_bytes(gif(500, 500, 3_000))
    video(folder / "8k.mjpeg", 4320, 7680, frames=1)
    names = [name for name in bombs if not name.endswith("svgz")] + ["many.tif", "many.gif", "8k.mjpeg"]
    paths = [str(folder / name) for name in ["warm.png", "warm.mp4", *names]]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (said, megabytes) for name, said, megabytes in map(json.loads, done.stdout.splitlines())}


REFUSED = ["wide.png", "huge.png", "moving.apng", "still.gif", "moving.gif", "wide.tif", "wide.webp", "wide.avi"]


@pytest.mark.parametrize("name", [*REFUSED, "wide.mjpeg"])
def test_a_huge_declared_size_is_refused_before_memory_is_taken(measured, name):
    said, megabytes = measured[name]
    assert "pixels" in said
    assert "\n" not in said
    assert megabytes < 24


@pytest.mark.parametrize(("name", "outcome"), [("wide.y4m", "can't be decoded"), ("lying.mp4", "read")])
def test_a_size_that_the_stream_belies_takes_no_memory(measured, name, outcome):
    said, megabytes = measured[name]
    assert outcome in said
    assert megabytes < 24


@pytest.mark.parametrize("name", ["text.png", "profile.png", "script.png"])
def test_what_is_packed_beside_pixels_takes_no_memory(measured, name):
    assert measured[name][1] < 100


@pytest.mark.parametrize("name", ["large.png", "deep.png", "clear.png"])
def test_a_large_image_takes_a_few_bytes_a_pixel(measured, name):
    said, megabytes = measured[name]
    assert said == "read"
    assert 3 < megabytes * 2**20 / (LARGE[0] * LARGE[1]) < 12


@pytest.mark.parametrize(("name", "most"), [("many.gif", 60), ("many.tif", 40), ("8k.mjpeg", 600)])
def test_many_and_large_frames_stay_within_a_bound(measured, name, most):
    said, megabytes = measured[name]
    assert "decoded" not in said
    assert megabytes < most


def test_a_stream_that_grows_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    small, large = video(tmp_path / "a.mjpeg", 48, 64), video(tmp_path / "b.mjpeg", 480, 640)
    (tmp_path / "both.mjpeg").write_bytes(small + large)
    assert {tuple(clip.frames.shape[1:3]) for clip in stream_video(tmp_path / "both.mjpeg")} == {(48, 64)}
    monkeypatch.setattr(limits, "MAX_VIDEO_PIXELS", 64 * 64)
    with pytest.raises(MediaError, match=r"can't be decoded|damaged"):
        list(stream_video(tmp_path / "both.mjpeg"))
