"""What the lines of a manifest become: items where their files are there, ledger rows where not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from toto.media.catalog import (
    Catalog,
    Item,
    Part,
    Seconds,
    class_order,
    files_below,
    is_file,
    path_below,
    readable_name,
)
from toto.media.decode import IMAGE_ENDINGS, VIDEO_ENDINGS, media_kind
from toto.media.ledger import LedgerRow, Status
from toto.runtime.errors import ConfigError
from toto.runtime.places import as_path
from toto.runtime.remote import RemotePath, is_url

SPLIT_IN_NAME = re.compile(r"(?:^|[-_./])(train|training|val|valid|validation|dev|test)(?=[-_./]|$)")


RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_IN_RANGE = 100_000


@dataclass
class Entries:
    """Collects the entries of a manifest in their order; `split` is that of entries which don't name one."""

    form: str
    counted: str = "line"
    split: str | None = None
    items: list[Item] = field(default_factory=list)
    skipped: list[LedgerRow] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    lines: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        id: str,
        path: Path | RemotePath | None,
        *,
        line: int,
        wanted: str = "",
        label: str | None = None,
        split: str | None = None,
        part: Part | None = None,
    ) -> None:
        """One entry: an item where `path` is a media file that is there, else a row that says what is wrong."""
        if label is not None:
            self.labels.add(label)
        if id in self.lines:
            self.refuse(
                f"{id} ({self.counted} {line})",
                "duplicate",
                f"named before in {self.counted} {self.lines[id]}",
                split=split,
            )
            return
        self.lines[id] = line
        if path is None or not path.is_file():
            where = wanted or str(path)
            self.refuse(id, "corrupt", f"missing: no file {where} ({self.counted} {line})", split=split)
            return
        kind = media_kind(path)
        if kind is None:
            reason = f"neither an image nor a video by its ending ({path.suffix or 'none'}, {self.counted} {line})"
            self.refuse(id, "skipped", reason, split=split)
        elif kind == "image" and isinstance(part, Seconds):
            self.refuse(id, "corrupt", f"an image has no seconds to cut ({self.counted} {line})", split=split)
        else:
            self.items.append(Item(id=id, path=path, kind=kind, label=label, part=part, split=split))

    def refuse(self, id: str, status: Status, reason: str, *, split: str | None = None) -> None:
        """An entry that becomes no item."""
        self.skipped.append(LedgerRow(id=id, kind="", status=status, reason=reason, split=split or self.split))

    def catalog(self, classes: tuple[str, ...] | None = None) -> Catalog:
        """All of it: items by id, windows by file and start; classes as given, else those of all entries."""
        return Catalog(
            items=tuple(sorted(self.items, key=_order)),
            skipped=tuple(self.skipped),
            form=self.form,
            classes=class_order(self.labels) if classes is None else classes,
        )


def _order(item: Item) -> tuple[str, float, str]:
    """Windows by their file, so that they follow each other; everything else by its id."""
    if not isinstance(item.part, Seconds):
        return item.id, 0.0, item.id
    return "/".join(item.path.parts), item.part.start, item.id


@dataclass(frozen=True)
class ClipFiles:
    """The media files below a folder, found by name without ending."""

    root: Path | RemotePath

    @cached_property
    def by_stem(self) -> dict[str, list[Path | RemotePath]]:
        """Files in alphabetical order under each name."""
        found: dict[str, list[Path | RemotePath]] = {}
        files: list[Any] = list(files_below(self.root))  # all of one kind
        for path in sorted(files):
            if path.suffix.lower() in VIDEO_ENDINGS | IMAGE_ENDINGS:
                found.setdefault(path.stem, []).append(path)
        return found

    def find(self, *stems: str, folders: tuple[str | None, ...] = ()) -> Path | RemotePath | None:
        """The file of the first of these names that is there; of several, one that lies in the first of these folders.

        Folder names match with spaces or underscores, in any case. Where nothing decides, the first in alphabetical
        order is taken.
        """
        for stem in stems:
            places = self.by_stem.get(stem, [])
            for folder in (_folded(name) for name in folders if name):
                places = [path for path in places if folder in map(_folded, path.parent.parts)] or places
            if places:
                return places[0]
        return None


def _folded(name: str) -> str:
    return name.replace("_", " ").casefold()


def relative_to_clips(text: str, clips: Path | RemotePath, manifest: Path | RemotePath) -> Path | RemotePath:
    """Where a path of a manifest leads: below the folder of the clips, beside the manifest, or to a URL."""
    if is_url(text):
        return as_path(text)
    path = _known(clips, text)
    if path.is_file() or clips == manifest.parent:
        return path
    beside = _known(manifest.parent, text)
    return beside if beside.is_file() else path


def _known(folder: Path | RemotePath, text: str) -> Path | RemotePath:
    """A file below a folder; elsewhere, what the folder's listing knows of it, so that nobody has to ask again."""
    path = folder / text
    if isinstance(path, RemotePath) and isinstance(folder, RemotePath):
        return folder.listed().get(path, path)
    return path


def split_in_name(name: str) -> str | None:
    """The split that a file is named after: train, val or test.

    >>> split_in_name("data/train-00000-of-00004.parquet"), split_in_name("training_day.tar"), split_in_name("all.tar")
    ('train', 'train', None)
    """
    found = SPLIT_IN_NAME.search(name.lower())
    if not found:
        return None
    word = found[1]
    return "train" if word.startswith("train") else "test" if word == "test" else "val"


def container_files(path: Path | RemotePath, *endings: str) -> list[tuple[str, Path | RemotePath]]:
    """A container, all with one of these endings below a folder, or those of a range, with their names.

    Raises:
        ConfigError: there is none, or one of a range is missing.
    """
    if RANGE.search(path.name):
        return [(file.name, file) for file in _expanded(path)]
    if is_file(path):
        return [(path.name, path)]
    found = [file for file in files_below(path) if file.name.lower().endswith(endings)]
    if not found:
        raise ConfigError(f"no {endings[0]} file here", where=path, fix="check the path")
    return sorted(((readable_name(path_below(file, path)), file) for file in found), key=lambda pair: pair[0])


def _expanded(path: Path | RemotePath) -> list[Path | RemotePath]:
    """The files of a name with `{000..099}` in it."""
    places = [path.parent / name for name in in_range(path.name)]
    for place in places:
        if not place.is_file():
            raise ConfigError("no such file", where=place, fix="check the range in braces")
    return places


def in_range(name: str) -> list[str]:
    """The names that ranges of numbers in braces stand for, with as many digits as are written.

    >>> in_range("shard-{098..101}.tar")
    ['shard-098.tar', 'shard-099.tar', 'shard-100.tar', 'shard-101.tar']
    """
    found = RANGE.search(name)
    if not found:
        return [name]
    first, last = int(found[1]), int(found[2])
    if last < first or last - first >= MOST_IN_RANGE:
        raise ConfigError(f"{found[0]} is no range of 1 to {MOST_IN_RANGE:,} files", where=name, fix="write {000..099}")
    numbers = (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))
    return [each for number in numbers for each in in_range(name[: found.start()] + number + name[found.end() :])]


def require_column(name: str, columns: Sequence[str], *, where: Path | RemotePath, option: str) -> None:
    """Refuse the name of a column that a table hasn't got.

    Raises:
        ConfigError: names those that it has.
    """
    if name not in columns:
        raise ConfigError(f"no column {name!r} (columns: {', '.join(columns)})", where=where, fix=f"check {option}")


def bad_line(path: Path | RemotePath, line: int, what: str, fix: str = "mend the line") -> ConfigError:
    """The error for a malformed manifest."""
    return ConfigError(f"line {line}: {what}", where=path, fix=fix)
