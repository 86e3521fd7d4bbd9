"""Whether test items are training items under another name: by the bytes of their files, then by their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from toto.evaluation.labelled import LabelledClips
from toto.media.catalog import Bytes, Item, Row, Seconds, size_of
from toto.media.decode import declared_size
from toto.media.reading import open_item, stream_item
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.places import sha256_at
from toto.runtime.progress import Progress, say
from toto.runtime.remote import RemotePath

SMALL = 16_384  # bytes; a header takes nearly as long to read as such an image to decode
MOST_BYTES = 4_000_000_000  # of images whose pixels are compared: some minutes of decoding
MOST_VIDEOS = 10_000  # likewise
OPENING = 64  # frames: more than titles last that many videos begin with
Content = tuple[str, float, float]
Look = Callable[[Item], bytes | None]  # what an item shows, or a part of it; None where it can't be read


def require_apart(train: LabelledClips, test: LabelledClips) -> None:
    """Refuse test items that are training items, too; pixels are compared of so many items as take minutes.

    Raises:
        ConfigError: names how many, the first, and what of them is equal.
    """
    for what, find in (("bytes", shared_content), ("pixels", shared_pixels)):
        if what == "pixels" and (much := _too_much((*train.items, *test.items))):
            say(f"{much} of training and test items: their bytes differ, and their pixels are not compared")
            return
        found = find(train.items, test.items)
        if found:
            first, other = next(iter(found.items()))
            raise ConfigError(
                f"{len(found)} of {len(test.items)} items are training items, too ({first} is {other}): "
                f"their {what} are equal",
                where=test.name,
                fix="remove them, or add --allow-overlap",
            )


def _too_much(items: Sequence[Item]) -> str:
    """How much there is, where it is too much to be decoded beforehand."""
    if items and items[0].kind == "video":
        return f"{len(items):,} videos" if len(items) > MOST_VIDEOS else ""
    size = sum(item.size for item in items)
    return f"{size / 1e9:,.0f} GB" if size > MOST_BYTES else ""


def shared_content(train: Iterable[Item], test: Iterable[Item]) -> dict[str, str]:
    """Test items that hold the same bytes (of a video's windows: the same seconds of them) as a training item.

    Files are hashed only where both sides have one of that size. What can't be read is left to the decoder.

    Returns:
        The id of each, with that of the first training item it equals.
    """
    sizes: list[dict[str, int]] = []
    known: dict[str, str] = {}
    sides = [list(train), list(test)]
    for number, side in enumerate(sides):
        sizes.append({})
        for item in side:
            key = f"{number}/{item.id}"
            if isinstance(item.part, Row):
                content = _bytes_of(item)
                if content is None:
                    continue
                known[key], size = hashlib.sha256(content).hexdigest(), len(content)
            else:
                size = (item.part.size if isinstance(item.part, Bytes) else size_of(item.path)) or 0
            if size:
                sizes[number][item.id] = size
    common = {*sizes[0].values()} & {*sizes[1].values()}
    contents: list[dict[Content, str]] = [{}, {}]
    for number, side in enumerate(sides):
        for item in side:
            if sizes[number].get(item.id) in common:
                content_of = _content(item, known.get(f"{number}/{item.id}"))
                if content_of is not None:
                    contents[number].setdefault(content_of, item.id)
    return {id: contents[0][content] for content, id in contents[1].items() if content in contents[0]}


def shared_pixels(train: Sequence[Item], test: Sequence[Item]) -> dict[str, str]:
    """Test items that show what a training item shows, whatever file it lies in: all frames are equal, pixel by pixel.

    Cheap looks come first, and only items that these can't tell apart are decoded whole. What can't be read is left to
    the decoder. An image that was compressed again with losses is another one.

    Returns:
        The id of each, with that of the first training item it equals.
    """
    if not train or not test:
        return {}
    seen: list[list[tuple[Item, bytes]]] = [[(item, b"") for item in side] for side in (train, test)]
    for what, look in _looks((*train, *test)):
        with Progress(f"comparing {what} of training and test items", total=sum(map(len, seen)), unit="items") as said:
            seen = [[(item, shown) for item, _ in side if (shown := _told(look, item, said))] for side in seen]
        common = {shown for _, shown in seen[0]} & {shown for _, shown in seen[1]}
        seen = [[(item, shown) for item, shown in side if shown in common] for side in seen]
        if not common:
            return {}
    first: dict[bytes, str] = {}
    for item, shown in seen[0]:
        first.setdefault(shown, item.id)
    return {item.id: first[shown] for item, shown in seen[1]}


def _looks(items: Sequence[Item]) -> tuple[tuple[str, Look], ...]:
    """The looks that are worth their time, the cheapest first; the last one decides."""
    if items[0].kind == "video":
        return ("first frames", _frames(1)), ("openings", _frames(OPENING)), ("all frames", _frames(None))
    elsewhere = any(isinstance(item.path, RemotePath) for item in items)  # for a header, all of it is fetched
    small = elsewhere or sum(item.size for item in items) < SMALL * len(items)
    pixels = ("pixels", _frames(None))
    return (pixels,) if small else (("sizes", _sides), pixels)


def _told(look: Look, item: Item, said: Progress) -> bytes | None:
    said.advance()
    try:
        return look(item)
    except MediaError:
        return None


def _sides(item: Item) -> bytes | None:
    """The sides of an image as its header tells them, the shorter one first: it may lie on its side."""
    sides = declared_size(open_item(item))
    return None if sides is None else repr(sorted(sides)).encode()


def _frames(most: int | None) -> Look:
    """Looks at the first so many frames, or at all of them."""

    def look(item: Item) -> bytes:
        found, count = hashlib.sha256(), 0
        for clip in stream_item(item, limit=most):
            frames = clip.frames if most is None else clip.frames[: most - count]
            found.update(repr(frames.shape[1:]).encode() if not count else b"")
            found.update(frames.numpy().data)
            count += len(frames)
            if count == most:
                break
        return found.digest()

    return look


def _content(item: Item, known: str | None) -> Content | None:
    part = item.part
    seconds = (part.start, -1.0 if part.end is None else part.end) if isinstance(part, Seconds) else (0.0, -1.0)
    if known is None and isinstance(part, Bytes):
        content = _bytes_of(item)
        known = None if content is None else hashlib.sha256(content).hexdigest()
    elif known is None:
        try:
            known = sha256_at(item.path)
        except OSError:
            return None
    return None if known is None else (known, *seconds)


def _bytes_of(item: Item) -> bytes | None:
    try:
        place = open_item(item)
    except MediaError:
        return None
    if hasattr(place, "read"):
        with place:
            return bytes(place.read())
    return place.read_bytes()
