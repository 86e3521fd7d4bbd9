"""Whether test items are training items under another name: found by what their files hold, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from toto.evaluation.labelled import LabelledClips
from toto.media.catalog import Bytes, Item, Row, Seconds, size_of
from toto.media.reading import open_item
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.places import sha256_at

Content = tuple[str, float, float]


def require_apart(train: LabelledClips, test: LabelledClips) -> None:
    """Refuse test items that are training items, too.

    Raises:
        ConfigError: names how many, and the first.
    """
    found = shared_content(train.items, test.items)
    if found:
        first, other = next(iter(found.items()))
        raise ConfigError(
            f"{len(found)} of {len(test.items)} items are training items, too ({first} is {other})",
            where=test.name,
            fix="remove them, or add --allow-overlap",
        )


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
