"""What files hold: by their checksums, and by stamps that tell without reading whether they are still the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from toto.media.catalog import Item
from toto.runtime.network import NOT_THERE
from toto.runtime.places import AnyPath, sha256_at
from toto.runtime.progress import Progress
from toto.runtime.remote import RemotePath

RECENT = 2.0  # seconds; a file that changed so shortly before may change once more and bear the same times
Told = list[object] | str | None


def stamp_of(path: AnyPath) -> Told:
    """Size, times and number of a file, which no copy keeps all; of one at a URL size and version, None if it is gone.

    Raises:
        PlaceError: it lies elsewhere and can't be reached.
    """
    try:
        if isinstance(path, RemotePath):
            return [path.size, path.version]
        found = path.stat()
    except NOT_THERE:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def content_of(path: AnyPath) -> Told:
    """The SHA-256 of a file; of one at a URL its stamp, as it would have to be fetched; None where it can't be read.

    Raises:
        PlaceError: it lies elsewhere and can't be reached.
    """
    if isinstance(path, RemotePath):
        return stamp_of(path)
    try:
        return sha256_at(path)
    except OSError:
        return None


def of_items(items: Iterable[Item], told: Callable[[AnyPath], Told]) -> list[list[object]]:
    """What is told of each item's file, once a file, with the part of it that is read."""
    known: dict[AnyPath, Told] = {}
    found: list[list[object]] = []
    for item in items:
        if item.path not in known:
            known[item.path] = told(item.path)
        found.append([known[item.path], repr(item.part)])
    return found


def contents_of(items: Iterable[Item], *, name: str) -> list[list[object]]:
    """The checksums of the items' files, with progress."""
    items = list(items)
    with Progress(f"checksums of {name}", total=len({item.path for item in items}), unit="files") as progress:

        def told(path: AnyPath) -> Told:
            progress.advance()
            return content_of(path)

        return of_items(items, told)


def settled(items: Iterable[Item], *, now: int) -> bool:
    """Whether no file changed in the last seconds before `now`, so that another change shows in its stamp.

    Args:
        items: whose files are meant.
        now: when their stamps were taken, in nanoseconds.
    """
    found = [path.stat() for path in {item.path for item in items} if isinstance(path, Path) and path.exists()]
    return all(max(each.st_mtime_ns, each.st_ctime_ns) < now - RECENT * 1e9 for each in found)
