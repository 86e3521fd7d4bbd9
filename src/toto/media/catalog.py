"""Lists what there is to read, without opening it: one item per input, with a stable id.

An item is a file, or a part of one: some seconds of a video, bytes inside a tar, a row of a parquet file. Folders are
listed here; manifests and containers in `toto.media.catalogs`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from toto.media.decode import Kind, media_kind
from toto.media.ledger import LedgerRow
from toto.runtime.errors import ConfigError
from toto.runtime.network import NOT_THERE
from toto.runtime.places import sha256_at
from toto.runtime.remote import AT_ONCE, RemotePath


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """The frames of a video that are shown at `start <= t < end`; `end` None reaches to the last one."""

    start: float
    end: float | None = None

    def __post_init__(self) -> None:
        end = math.inf if self.end is None else self.end
        if not 0 <= self.start < end or not math.isfinite(self.start):
            raise ConfigError(f"a window from {self.start:g} s to {end:g} s holds nothing")


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """`size` bytes of a file from `offset`, as a member of a tar lies in it."""

    offset: int
    size: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.size < 0:
            raise ConfigError(f"{self.size} bytes from {self.offset} are no part of a file")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The bytes in one row of a parquet file.

    Attributes:
        number: of the row, from 0.
        column: that holds the bytes, or a struct with a field `bytes`.
        size: about how many bytes: those of the file by its rows.
    """

    number: int
    column: str
    size: int

    def __post_init__(self) -> None:
        if self.number < 0 or self.size < 0:
            raise ConfigError(f"row {self.number} of {self.size} bytes is no row of a file")


Part = Seconds | Bytes | Row


@dataclass(frozen=True, kw_only=True)
class Item:
    """One input.

    Attributes:
        id: names it in every output; never moves while the source stays the same. In a folder: its path below the
            folder, with forward slashes.
        path: the file that it is, or that it lies in, on a disk or at a URL.
        kind: image or video, by its ending.
        label: name of its class; in a folder, the first folder below the root. None where there is none.
        part: which part of the file; None is the whole file.
        split: train, val, ... where the source says.
    """

    id: str
    path: Path | RemotePath
    kind: Kind
    label: str | None
    part: Part | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if not self.id:
            raise ConfigError("an item without an id", where=self.path)
        if isinstance(self.part, Seconds) and self.kind == "image":
            raise ConfigError("an image has no seconds to cut", where=self.id)

    @property
    def size(self) -> int:
        """Its bytes (of a window: those of its file); 0 where it is missing."""
        if isinstance(self.part, Bytes | Row):
            return self.part.size
        return size_of(self.path) or 0


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The items of a source, and ledger rows of what it names that can't be read.

    Attributes:
        items: in a fixed order, that of their ids where nothing else is said; windows of one file follow each other.
        skipped: files that are not media, clips that a manifest names and nobody finds, entries named twice.
        form: how the source is laid out: imagefolder, kinetics, ...
        classes: names in the order that the source gives its classes, of all splits; None in a folder, whose classes
            are those of the items that were kept, in alphabetical order.
    """

    items: tuple[Item, ...]
    skipped: tuple[LedgerRow, ...]
    form: str = "imagefolder"
    classes: tuple[str, ...] | None = None


def size_of(path: Path | RemotePath) -> int | None:
    """Bytes of a file; None where it is missing or where a web server doesn't tell."""
    if isinstance(path, Path):
        return path.stat().st_size if path.is_file() else None
    try:
        return path.size
    except NOT_THERE:
        return None


def class_order(labels: Iterable[str | None]) -> tuple[str, ...]:
    """Each label once: by number where all are whole numbers, else by alphabet.

    >>> class_order(["10", "9", None, "9"])
    ('9', '10')
    """
    names = {label for label in labels if label is not None}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def units(items: Iterable[Item]) -> list[tuple[Item, ...]]:
    """What is read in one pass: an item by itself, or the windows of one file that follow each other."""
    found: list[list[Item]] = []
    for item in items:
        last = found[-1][-1] if found else None
        windows = last is not None and isinstance(last.part, Seconds) and isinstance(item.part, Seconds)
        if windows and last is not None and last.path == item.path:
            found[-1].append(item)
        else:
            found.append([item])
    return [tuple(unit) for unit in found]


def list_source(source: Path | RemotePath) -> Catalog:
    """List a folder with all below it (links followed, hidden names left out), or one file.

    Raises:
        ConfigError: it doesn't exist, or holds nothing to read.
        PlaceError: it lies elsewhere and can't be reached.
    """
    if not source.exists():
        raise ConfigError("no such file or folder", where=source, fix="check the path")
    files = [source] if is_file(source) else list(files_below(source))
    items, skipped = [], []
    for file in files:
        relative = path_below(file, source) if file != source else PurePath(file.name)
        name = readable_name(relative)
        kind = media_kind(file)
        if kind is None:
            reason = f"neither an image nor a video by its ending ({file.suffix or 'none'})"
            skipped.append(LedgerRow(id=name, kind="", status="skipped", reason=reason))
        else:
            label = relative.parts[0] if len(relative.parts) > 1 else None
            items.append(Item(id=name, path=file, kind=kind, label=label))
    if not items:
        found = f"{len(skipped)} files of other kinds" if skipped else "it is empty"
        raise ConfigError(f"no image or video here ({found})", where=source, fix="give a folder of images or videos")
    return Catalog(items=tuple(sorted(items, key=lambda item: item.id)), skipped=tuple(skipped))


def find_duplicates(items: tuple[Item, ...]) -> dict[str, str]:
    """Items whose file is, byte for byte, that of an item before them: id -> id of the first.

    Only files of equal size are hashed, so a folder without duplicates is hardly read. Parts of files are left out.
    """
    by_size: dict[int | None, list[Item]] = {}
    for item in items:
        if item.part is None:
            by_size.setdefault(size_of(item.path), []).append(item)
    by_size.pop(None, None)  # a dangling link is left to the decoder, which names it
    duplicates = {}
    for alike in by_size.values():
        first: dict[str, str] = {}
        for item, content in _contents(alike if len(alike) > 1 else []):
            original = first.setdefault(content, item.id)
            if original != item.id:
                duplicates[item.id] = original
    return duplicates


def _contents(items: list[Item]) -> Iterator[tuple[Item, str]]:
    """The checksums of files, from elsewhere several at once; what can't be read is left to the decoder."""
    if all(isinstance(item.path, Path) for item in items):
        yield from ((item, sha256_at(item.path)) for item in items)
        return

    def content(item: Item) -> str:
        try:
            return sha256_at(item.path)
        except NOT_THERE:
            return f"unreadable {item.id}"

    with ThreadPoolExecutor(AT_ONCE) as threads:
        yield from zip(items, threads.map(content, items), strict=True)


def is_file(path: Path | RemotePath) -> bool:
    """Whether a source is one file; the web calls everything a file, also what has a page with links."""
    return path.is_file() and not (isinstance(path, RemotePath) and path.is_dir())


def path_below(file: Path | RemotePath, root: Path | RemotePath) -> PurePath:
    """Where a file lies below a folder."""
    if isinstance(file, Path) and isinstance(root, Path):
        return file.relative_to(root)
    assert isinstance(file, RemotePath)
    assert isinstance(root, RemotePath)
    return PurePosixPath(file.below(root))


def readable_name(path: PurePath) -> str:
    """A path with forward slashes, bytes that are no UTF-8 written out."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _unreadable(error: OSError) -> None:
    raise ConfigError(
        f"folder can't be listed ({error.strerror})", where=error.filename, fix="check its permissions"
    ) from None


def files_below(root: Path | RemotePath) -> Iterator[Path | RemotePath]:
    """All files below a folder: links followed, hidden names left out, folder by folder in alphabetical order."""
    if isinstance(root, RemotePath):
        yield from root.files()
        return
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
        yield from (file for file in files if file.is_file() or file.is_symlink())
