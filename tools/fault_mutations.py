"""Damage to media files: what disks, networks and people do to them, and what an attacker would; all seeded.

A mutation takes an original, all originals (to take parts from) and a generator, and returns a file's ending and
content. File `number` of a campaign is a pure function of (seed, number, originals).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from fault_bombs import BOMBS, bomb
from fault_originals import Original

from toto.runtime.seed import stream

HEAD = 1024  # where most formats keep what they declare
BOMB_EVERY, FOLDER_EVERY = 250, 1000
Damaged = tuple[str, bytes]
Mutation = Callable[[Original, Sequence[Original], np.random.Generator], Damaged]


@dataclass(frozen=True, kw_only=True)
class Field:
    """A number in a file: where, how many bytes, their order; or one of EBML's lengths."""

    place: int
    width: int
    order: Literal["big", "little", "ebml"] = "big"


def flipped_bits(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    return one.ending, _flip(one.content, len(one.content), rng)


def flipped_bits_in_the_head(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    return one.ending, _flip(one.content, min(HEAD, len(one.content)), rng)


def truncated(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    return one.ending, one.content[: int(rng.integers(1, len(one.content)))]


def truncated_in_the_head(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    return one.ending, one.content[: int(rng.integers(1, min(HEAD, len(one.content))))]


def spliced_header(one: Original, all_: Sequence[Original], rng: np.random.Generator) -> Damaged:
    """The beginning of another file, then the rest of this one."""
    other = all_[rng.integers(len(all_))].content
    place = int(rng.integers(4, min(HEAD, len(one.content), len(other))))
    return one.ending, other[:place] + one.content[place:]


def swapped_ending(one: Original, all_: Sequence[Original], rng: np.random.Generator) -> Damaged:
    """A whole file under the name of another format."""
    return all_[rng.integers(len(all_))].ending, one.content


def zero_bytes(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    """A run of zeros, as a disk leaves that lost its blocks."""
    first, last = _span(one.content, rng)
    return one.ending, one.content[:first] + bytes(last - first) + one.content[last:]


def huge_numbers(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    """One to three of the sizes, counts and lengths that the format declares, made very large."""
    content = bytearray(one.content)
    fields = list(numbers_in(bytes(content))) or [Field(place=int(rng.integers(len(content) - 4)), width=4)]
    for number in rng.choice(len(fields), min(len(fields), int(rng.integers(1, 4))), replace=False):
        _set_huge(content, fields[number], rng)
    return one.ending, _with_right_checksums(bytes(content))


def doubled_chunk(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    first, last = _span(one.content, rng)
    return one.ending, one.content[:last] + one.content[first:]


def missing_chunk(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    first, last = _span(one.content, rng)
    return one.ending, one.content[:first] + one.content[last:]


def random_chunk(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    first, last = _span(one.content, rng)
    return one.ending, one.content[:first] + rng.bytes(last - first) + one.content[last:]


def random_bytes(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    return one.ending, rng.bytes(int(rng.integers(1, 4096)))


def glued(one: Original, all_: Sequence[Original], rng: np.random.Generator) -> Damaged:
    """Another file behind this one."""
    return one.ending, one.content + all_[rng.integers(len(all_))].content


def empty(one: Original, _all: Sequence[Original], _rng: np.random.Generator) -> Damaged:
    return one.ending, b""


def untouched(one: Original, _all: Sequence[Original], rng: np.random.Generator) -> Damaged:
    """The file itself with a few bytes behind it, which no format minds: it should stay readable."""
    return one.ending, one.content + bytes(int(rng.integers(1, 64)))


MUTATIONS: dict[str, tuple[Mutation, int]] = {  # with how often, as a weight
    "flipped-bits": (flipped_bits, 4),
    "flipped-head": (flipped_bits_in_the_head, 4),
    "truncated": (truncated, 3),
    "truncated-head": (truncated_in_the_head, 1),
    "spliced-header": (spliced_header, 3),
    "swapped-ending": (swapped_ending, 1),
    "zero-bytes": (zero_bytes, 2),
    "huge-numbers": (huge_numbers, 5),
    "doubled-chunk": (doubled_chunk, 2),
    "missing-chunk": (missing_chunk, 2),
    "random-chunk": (random_chunk, 2),
    "random-bytes": (random_bytes, 1),
    "glued": (glued, 1),
    "empty": (empty, 1),
    "untouched": (untouched, 1),
}


def mutated(originals: Sequence[Original], seed: int, number: int) -> tuple[str, bytes]:
    """Name and content of file `number`; the name says which mutation of which original it is.

    Every 250th is a bomb, every 1000th is to lie in a folder that is named like a video.
    """
    if number % BOMB_EVERY == BOMB_EVERY // 2:
        name = list(BOMBS)[number // BOMB_EVERY % len(BOMBS)]
        return f"{number:06d}.bomb.{name}.png", bomb(name)
    rng = stream(seed, "fault", number)
    names = list(MUTATIONS)
    weights = np.array([weight for _, weight in MUTATIONS.values()], float)
    name = names[rng.choice(len(names), p=weights / weights.sum())]
    one = originals[rng.integers(len(originals))]
    ending, content = MUTATIONS[name][0](one, originals, rng)
    return f"{number:06d}.{name}.{Path(one.name).stem}-{one.ending[1:]}{ending}", content


def mutation_of(name: str) -> str:
    """Which mutation a file's name says.

    >>> mutation_of("part0/000012.zero-bytes.plain-jpg.jpg")
    'zero-bytes'
    """
    return Path(name).name.split(".")[1]


def write_mutated(folder: Path, originals: Sequence[Original], seed: int, numbers: range) -> list[Path]:
    """Write files of a campaign; every thousandth lies in a folder named like a video, beside an empty such folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number in numbers:
        name, content = mutated(originals, seed, number)
        path = folder / name
        if number % FOLDER_EVERY == 0:
            (folder / f"{number:06d}.empty-folder.png").mkdir(exist_ok=True)
            path = folder / f"{number:06d}.folder.mp4" / name
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written


def numbers_in(content: bytes) -> Iterator[Field]:
    """Sizes, counts and lengths that a file declares, found by the marks of its format."""
    if content.startswith(b"\x89PNG"):
        yield from (Field(place=16, width=4), Field(place=20, width=4), Field(place=8, width=4))
        for tag in (b"acTL", b"fcTL", b"IDAT", b"fdAT"):
            for place in _each(content, tag):
                yield from (Field(place=place - 4, width=4), Field(place=place + 4, width=4))
                if tag == b"fcTL":
                    yield from (Field(place=place + 8, width=4), Field(place=place + 12, width=4))
    elif content.startswith(b"\xff\xd8"):
        for mark in (b"\xff\xc0", b"\xff\xc2"):
            for place in _each(content, mark):
                yield from (Field(place=place + offset, width=2) for offset in (2, 5, 7))
        for mark in (b"\xff\xc4", b"\xff\xda", b"\xff\xdb"):
            yield from (Field(place=place + 2, width=2) for place in _each(content, mark))
    elif content.startswith(b"GIF8"):
        yield from (Field(place=place, width=2, order="little") for place in (6, 8))
        for place in _each(content, b"\x21\xf9\x04"):
            yield from (Field(place=place + offset, width=2, order="little") for offset in (9, 11, 13, 15))
    elif content.startswith(b"BM"):
        yield from (Field(place=place, width=4, order="little") for place in (2, 10, 18, 22))
    elif content.startswith((b"II*\0", b"MM\0*")):
        yield from _tiff_fields(content)
    elif content.startswith(b"RIFF"):
        for tag in (b"RIFF", b"LIST", b"VP8 ", b"VP8L", b"VP8X", b"ANMF", b"idx1", b"00dc", b"avih", b"strf"):
            for place in _each(content, tag):
                yield Field(place=place + 4, width=4, order="little")
                size = {b"VP8X": (12, 15), b"VP8 ": (14, 16), b"avih": (40, 44), b"strf": (12, 16)}.get(tag, ())
                width = {b"VP8X": 3, b"VP8 ": 2}.get(tag, 4)
                yield from (Field(place=place + offset, width=width, order="little") for offset in size)
    elif content.startswith(b"\x1a\x45\xdf\xa3"):
        for tag in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b", b"\x1c\x53\xbb\x6b", b"\x63\xa2"):
            yield from (Field(place=place + len(tag), width=1, order="ebml") for place in _each(content, tag))
        for tag in (b"\xb0", b"\xba", b"\xa3"):
            yield from (Field(place=place + 1, width=1, order="ebml") for place in list(_each(content, tag))[:8])
            yield from (Field(place=place + 2, width=1) for place in list(_each(content, tag))[:8])
    elif content[4:8] in (b"ftyp", b"jP  "):
        yield from _box_fields(content)
    elif content.startswith(b"P6"):
        yield Field(place=3, width=2)


def _box_fields(content: bytes) -> Iterator[Field]:
    """Sizes of boxes, and the numbers in those that say how large a picture or a table is."""
    inside = {
        b"tkhd": (80, 84), b"stsz": (8, 12), b"stts": (8, 12), b"stco": (8, 12), b"stsc": (8, 12), b"ctts": (8,),
        b"stss": (8,), b"mvhd": (16, 20), b"mdhd": (16, 20), b"trun": (8, 12), b"ihdr": (4, 8), b"ispe": (8, 12),
        b"elst": (8,), b"sidx": (12,), b"iloc": (8,), b"meta": (4,),
    }  # fmt: skip
    shorts = {b"avc1": (28, 30), b"hev1": (28, 30), b"avcC": (10,), b"hvcC": (26,), b"av01": (28, 30)}
    for tag in (b"ftyp", b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"mdat", b"moof", b"jp2h", b"jp2c"):
        yield from (Field(place=place - 4, width=4) for place in _each(content, tag) if place >= 4)
    for tag, offsets in inside.items():
        for place in _each(content, tag):
            yield Field(place=place - 4, width=4)
            yield from (Field(place=place + offset, width=4) for offset in offsets)
    for tag, offsets in shorts.items():
        for place in _each(content, tag):
            yield from (Field(place=place + offset, width=2) for offset in offsets)
    for place in _each(content, b"\xff\x4f\xff\x51"):  # a JPEG 2000 codestream: the picture's and the tiles' sizes
        yield from (Field(place=place + offset, width=4) for offset in (8, 12, 24, 28))


def _tiff_fields(content: bytes) -> Iterator[Field]:
    order: Literal["big", "little"] = "little" if content.startswith(b"II") else "big"
    table = int.from_bytes(content[4:8], order)
    yield Field(place=4, width=4, order=order)
    for number in range(min(64, int.from_bytes(content[table : table + 2], order))):
        entry = table + 2 + 12 * number
        yield from (Field(place=entry + 4, width=4, order=order), Field(place=entry + 8, width=4, order=order))


def _set_huge(content: bytearray, field: Field, rng: np.random.Generator) -> None:
    if field.place < 0 or field.place + field.width > len(content):
        return
    if field.order == "ebml":  # a length of as many bytes as it had, all ones, or the largest that is not "unknown"
        first = content[field.place]
        width = 9 - first.bit_length() if first else 1
        marked = (1 << 7 * width) | ((1 << 7 * width) - 1 - int(rng.integers(2)))
        content[field.place : field.place + width] = marked.to_bytes(width, "big")
        return
    most = (1 << 8 * field.width) - 1
    values = [most, most >> 1, most - 1, 30_000, 60_000, 1 << 20, 1 << 30]
    value = int(rng.choice([value for value in values if value <= most]))
    content[field.place : field.place + field.width] = value.to_bytes(field.width, field.order)


def _with_right_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them now, so that a decoder believes them."""
    if not content.startswith(b"\x89PNG"):
        return content
    mended, place = bytearray(content), 8
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(content):
            break
        mended[end : end + 4] = zlib.crc32(content[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(mended)


def _each(content: bytes, tag: bytes) -> Iterator[int]:
    place = content.find(tag)
    while place >= 0:
        yield place
        place = content.find(tag, place + 1)


def _flip(content: bytes, within: int, rng: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    for place in rng.integers(0, within, int(rng.choice([1, 3, 10, 50]))):
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _span(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    """A stretch of a file: mostly short, sometimes half of it."""
    longest = max(2, int(len(content) * rng.choice([0.02, 0.1, 0.5])))
    first = int(rng.integers(len(content)))
    return first, min(len(content), first + int(rng.integers(1, longest)))
