"""What is too large or too small to be decoded, told by declared sizes before memory is taken."""

from __future__ import annotations

from toto.runtime.errors import MediaError, ShortMediaError

MAX_PIXELS = 100_000_000
MAX_VIDEO_PIXELS = (
    8192 * 4352
)  # the largest picture of H.264, HEVC and AV1 at level 6.2; a decoder holds up to 17 of them
MIN_SIDE = 8


def require_size(height: int, width: int, most: int, *, where: str) -> None:
    """Refuse a picture of more than `most` pixels, or with a side too short to use.

    Raises:
        MediaError: it is too large.
        ShortMediaError: it is too small.
    """
    if height * width > most:
        raise MediaError(f"declares {width} x {height} pixels, the limit is {most:,}", where=where, fix="scale it down")
    if min(height, width) < MIN_SIDE:
        raise ShortMediaError(
            f"{width} x {height} pixels, each side needs at least {MIN_SIDE}",
            where=where,
            fix="remove it from the folder",
        )
