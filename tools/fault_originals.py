"""Small media files of many formats, the same bytes each time: what the fault campaign starts from."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from toto.media.decode import media_kind
from toto.media.procedural import make_clip

FRAMES, SIZE, RATE = 24, 64, 12  # x265 corrupts its memory below 64 pixels
LARGEST = 4_000_000  # bytes of a user's file
VIDEOS = {  # name: (format, codec, pixel format, options)
    "h264.mp4": ("mp4", "libx264", "yuv420p", {"x264-params": "mbtree=0:bframes=2"}),
    "fragments.mp4": ("mp4", "libx264", "yuv420p", {"x264-params": "mbtree=0"}),
    "hevc.mp4": ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "h264.mov": ("mov", "libx264", "yuv420p", {"x264-params": "mbtree=0"}),
    "h264.mkv": ("matroska", "libx264", "yuv420p", {"x264-params": "mbtree=0"}),
    "vp9.webm": ("webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "vp8.webm": ("webm", "libvpx", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "mpeg4.avi": ("avi", "mpeg4", "yuv420p", {}),
    "h264.ts": ("mpegts", "libx264", "yuv420p", {"x264-params": "mbtree=0"}),
    "mpeg2.mpg": ("mpeg", "mpeg2video", "yuv420p", {}),
    "flv.flv": ("flv", "flv", "yuv420p", {}),
    "wmv.wmv": ("asf", "wmv2", "yuv420p", {}),
    "moving.apng": ("apng", "apng", "rgb24", {}),
}


@dataclass(frozen=True, kw_only=True)
class Original:
    """A file to damage: its name and its bytes."""

    name: str
    content: bytes

    @property
    def ending(self) -> str:
        return Path(self.name).suffix


def make_originals() -> list[Original]:
    """One file of each format that is in daily use."""
    frames = make_clip(11, 0, frames=FRAMES, size=SIZE).clip.frames.numpy()
    videos = [Original(name=name, content=_video(frames, name)) for name in VIDEOS]
    return [*videos, *_images(frames)]


def read_originals(folder: Path) -> list[Original]:
    """The media files below a folder, where they are not very large.

    Raises:
        SystemExit: there is none.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and media_kind(path)]
    small = [path for path in files if path.stat().st_size <= LARGEST]
    if not small:
        raise SystemExit(f"{folder}: no media file of at most {LARGEST:,} bytes ({len(files)} larger ones)")
    return [Original(name=path.name, content=path.read_bytes()) for path in small]


def _video(frames: np.ndarray, name: str) -> bytes:
    form, codec, pixels, options = VIDEOS[name]
    flags = {"fflags": "+bitexact"}
    if name.startswith("fragments"):
        flags["movflags"] = "frag_keyframe+empty_moov"
    elif form in ("mp4", "mov"):
        flags["movflags"] = "faststart"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name  # an index at the front needs a file to be moved in
        _encode(path, frames, form, codec, pixels, flags, options)
        return path.read_bytes()


def _encode(
    path: Path,
    frames: np.ndarray,
    form: str,
    codec: str,
    pixels: str,
    flags: dict[str, str],
    options: dict[str, str],
) -> None:
    rate = Fraction(24) if codec == "mpeg2video" else Fraction(RATE)
    with av.open(str(path), "w", format=form, options=flags) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.options = {"threads": "1", "g": "8", "flags": "+bitexact"} | options
        stream.codec_context.thread_count = 1
        for picture in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def _images(frames: np.ndarray) -> Iterable[Original]:
    still = Image.fromarray(frames[0])
    deep = Image.fromarray(frames[0, :, :, 0].astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([frames[0], frames[0, :, :, 0]]))
    moving = [Image.fromarray(picture) for picture in frames[1:8]]
    later = {"save_all": True, "append_images": moving, "duration": 80}
    saves: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("eight.png", still, "PNG", {}),
        ("sixteen.png", deep, "PNG", {}),
        ("clear.png", clear, "PNG", {}),
        ("palette.png", still.quantize(16), "PNG", {}),
        ("plain.jpg", still, "JPEG", {"quality": 90}),
        ("progressive.jpg", still, "JPEG", {"quality": 90, "progressive": True}),
        ("lossy.webp", still, "WEBP", {"quality": 80}),
        ("lossless.webp", clear, "WEBP", {"lossless": True}),
        ("moving.webp", still, "WEBP", later),
        ("plain.tiff", still, "TIFF", {}),
        ("packed.tif", still, "TIFF", {"compression": "tiff_lzw"}),
        ("plain.bmp", still, "BMP", {}),
        ("still.gif", still, "GIF", {}),
        ("moving.gif", still, "GIF", later),
        ("plain.ppm", still, "PPM", {}),
        ("plain.jp2", still, "JPEG2000", {}),
        ("plain.avif", still, "AVIF", {"max_threads": 1}),
    ]
    for name, image, form, options in saves:
        written = io.BytesIO()
        image.save(written, format=form, **options)
        yield Original(name=name, content=written.getvalue())
