"""Lists what there is to read, without opening it: one item per file, with a stable id."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from toto.media.decode import Kind, media_kind
from toto.media.ledger import LedgerRow
from toto.runtime.errors import ConfigError
from toto.runtime.files import sha256_of


@dataclass(frozen=True, kw_only=True)
class Item:
    """One input.

    Attributes:
        id: path below the catalog's root with forward slashes.
        path: where the file is.
        kind: image or video, by its ending.
        label: name of the folder directly below the root, as in a folder tree of classes; None at the root itself.
    """

    id: str
    path: Path
    kind: Kind
    label: str | None


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The items of a source in the order of their ids, and the ledger rows of files that are not media."""

    items: tuple[Item, ...]
    skipped: tuple[LedgerRow, ...]


def list_source(source: Path) -> Catalog:
    """List a folder with all below it (links followed, hidden names left out), or one file.

    Raises:
        ConfigError: it doesn't exist, or holds nothing to read.
    """
    if not source.exists():
        raise ConfigError("no such file or folder", where=source, fix="check the path")
    files = [source] if source.is_file() else list(_walk(source))
    items, skipped = [], []
    for file in files:
        relative = file.relative_to(source) if file != source else Path(file.name)
        name = os.fsencode(relative.as_posix()).decode("utf-8", "backslashreplace")
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
    """Items whose bytes are those of an item before them: id -> id of the first.

    Only files of equal size are hashed, so a folder without duplicates is hardly read.
    """
    by_size: dict[int, list[Item]] = {}
    for item in items:
        if item.path.is_file():  # a dangling link is left to the decoder, which names it
            by_size.setdefault(item.path.stat().st_size, []).append(item)
    duplicates = {}
    for alike in by_size.values():
        first: dict[str, str] = {}
        for item in alike if len(alike) > 1 else []:
            original = first.setdefault(sha256_of(item.path), item.id)
            if original != item.id:
                duplicates[item.id] = original
    return duplicates


def _unreadable(error: OSError) -> None:
    raise ConfigError(
        f"folder can't be listed ({error.strerror})", where=error.filename, fix="check its permissions"
    ) from None


def _walk(root: Path) -> list[Path]:
    files: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    return [file for file in files if file.is_file() or file.is_symlink()]
