"""Images whose few bytes become many: legal at the limit of pixels, beyond it, and very long and narrow ones."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PIXEL_BYTES = {("grey", 8): 1, ("grey", 16): 2, ("rgb", 8): 3, ("rgb", 16): 6, ("clear", 8): 4}
COLOURS = {"grey": 0, "rgb": 2, "clear": 6}
BOMBS = {  # name: (width, height, colour, bits)
    "at-the-limit": (9_900, 10_000, "grey", 8),
    "at-the-limit-16-bit": (9_900, 10_000, "grey", 16),
    "at-the-limit-clear": (9_900, 10_000, "clear", 8),
    "beyond-the-limit": (20_000, 20_000, "grey", 8),
    "far-beyond-the-limit": (60_000, 60_000, "grey", 8),
    "wide": (500_000, 8, "rgb", 8),
    "tall": (9, 400_000, "rgb", 8),
}


def bomb(name: str) -> bytes:
    """A PNG of one colour, whole and right in every checksum; beyond 400 megapixels, its pixels end early."""
    width, height, colour, bits = BOMBS[name]
    row = b"\0" + b"\x7f" * (width * PIXEL_BYTES[colour, bits])
    head = struct.pack(">2I5B", width, height, bits, COLOURS[colour], 0, 0, 0)
    chunks = [(b"IHDR", head), *((b"IDAT", part) for part in _compressed(row, min(height, 4 * 10**8 // width)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(tag, content) for tag, content in [*chunks, (b"IEND", b"")])


def _compressed(row: bytes, height: int) -> Iterator[bytes]:
    packer = zlib.compressobj(1)
    for _ in range(height):
        yield packer.compress(row)
    yield packer.flush()


def _chunk(tag: bytes, content: bytes) -> bytes:
    if tag == b"IDAT" and not content:
        return b""
    return struct.pack(">I", len(content)) + tag + content + struct.pack(">I", zlib.crc32(tag + content))
