"""What the lines of a manifest become: items where their files are there, ledger rows where not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from toto.media.catalog import Catalog, Item, Part, Seconds, class_order, files_below, readable_name
from toto.media.decode import IMAGE_ENDINGS, VIDEO_ENDINGS, media_kind
from toto.media.ledger import LedgerRow, Status
from toto.runtime.errors import ConfigError

SPLIT_IN_NAME = re.compile(r"(?:^|[-_./])(train|training|val|valid|validation|dev|test)(?=[-_./]|$)")


@dataclass
class Entries:
    """Collects the entries of a manifest in their order."""

    form: str
    counted: str = "line"
    items: list[Item] = field(default_factory=list)
    skipped: list[LedgerRow] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    lines: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        id: str,
        path: Path | None,
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
                f"{id} ({self.counted} {line})", "duplicate", f"named before in {self.counted} {self.lines[id]}"
            )
            return
        self.lines[id] = line
        if path is None or not path.is_file():
            where = wanted or str(path)
            self.refuse(id, "corrupt", f"missing: no file {where} ({self.counted} {line})")
            return
        kind = media_kind(path)
        if kind is None:
            reason = f"neither an image nor a video by its ending ({path.suffix or 'none'}, {self.counted} {line})"
            self.refuse(id, "skipped", reason)
        elif kind == "image" and isinstance(part, Seconds):
            self.refuse(id, "corrupt", f"an image has no seconds to cut ({self.counted} {line})")
        else:
            self.items.append(Item(id=id, path=path, kind=kind, label=label, part=part, split=split))

    def refuse(self, id: str, status: Status, reason: str) -> None:
        """An entry that becomes no item."""
        self.skipped.append(LedgerRow(id=id, kind="", status=status, reason=reason))

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
    return (str(item.path), item.part.start, item.id) if isinstance(item.part, Seconds) else (item.id, 0.0, item.id)


@dataclass(frozen=True)
class ClipFiles:
    """The media files below a folder, found by name without ending."""

    root: Path

    @cached_property
    def by_stem(self) -> dict[str, list[Path]]:
        """Files in alphabetical order under each name."""
        found: dict[str, list[Path]] = {}
        for path in sorted(files_below(self.root)):
            if path.suffix.lower() in VIDEO_ENDINGS | IMAGE_ENDINGS:
                found.setdefault(path.stem, []).append(path)
        return found

    def find(self, *stems: str, folders: tuple[str | None, ...] = ()) -> Path | None:
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


def relative_to_clips(text: str, clips: Path, manifest: Path) -> Path:
    """Where a path of a manifest leads: below the folder of the clips, or beside the manifest."""
    path = clips / text
    beside = manifest.parent / text
    return beside if not path.is_file() and beside.is_file() else path


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


def container_files(path: Path, ending: str) -> list[tuple[str, Path]]:
    """A container, or all with this ending below a folder, with their names below it."""
    if path.is_file():
        return [(path.name, path)]
    found = [file for file in files_below(path) if file.suffix.lower() == ending]
    if not found:
        raise ConfigError(f"no {ending} file here", where=path, fix="check the path")
    return sorted((readable_name(file.relative_to(path)), file) for file in found)


def bad_line(path: Path, line: int, what: str, fix: str = "mend the line") -> ConfigError:
    """The error for a malformed manifest."""
    return ConfigError(f"line {line}: {what}", where=path, fix=fix)
