"""Clips to files that a person can open: MP4, GIF, PNG."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from toto.runtime.files import written_aside


def write_video(path: Path, frames: UInt8[Tensor, "T H W 3"], *, rate: float, scale: int = 1, crf: int = 12) -> None:
    """Write an H.264 MP4 that every browser plays.

    Args:
        path: the file, replaced atomically.
        frames: uint8 `[T, H, W, 3]`; odd sides lose their last row or column, which yuv420p can't hold.
        rate: frames a second.
        scale: enlarge by this whole factor, pixels kept sharp.
        crf: x264's quality, lower is better.
    """
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    large = even.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    with (
        written_aside(path) as aside,
        av.open(str(aside), "w", format="mp4", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = large.shape[2], large.shape[1], "yuv420p"
        # Without macroblock trees, which read memory that x264 never set, the same frames give the same bytes.
        stream.options = {"crf": str(crf), "threads": "1", "x264-params": "mbtree=0"}
        for picture in large.contiguous().numpy():
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def write_gif(path: Path, frames: UInt8[Tensor, "T H W 3"], *, rate: float, scale: int = 1) -> None:
    """Write a looping GIF."""
    large = frames.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    pictures = [Image.fromarray(picture) for picture in large.contiguous().numpy()]
    with written_aside(path) as aside:
        pictures[0].save(
            aside,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / rate),
            loop=0,
        )


def write_image(path: Path, picture: UInt8[Tensor, "H W 3"]) -> None:
    """Write a PNG."""
    with written_aside(path) as aside:
        Image.fromarray(picture.contiguous().numpy()).save(aside, format="PNG")
