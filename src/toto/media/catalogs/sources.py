"""Which kind of source this is, by its form or by name, and its catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from toto.media.catalog import Catalog, files_below, is_file, list_source
from toto.media.catalogs import containers, manifests, tables
from toto.media.catalogs.entries import RANGE, in_range
from toto.media.decode import IMAGE_ENDINGS, VIDEO_ENDINGS
from toto.media.unpacked import TAR_ENDINGS
from toto.runtime.errors import ConfigError
from toto.runtime.places import as_path
from toto.runtime.remote import RemotePath

Opener = Callable[..., Catalog]  # of the source, and the folder of its clips; with the columns of `COLUMNS`


def _folder(path: Path | RemotePath, _clips: Path | RemotePath) -> Catalog:
    return list_source(path)


KINDS: dict[str, Opener] = {
    "imagefolder": _folder,
    "kinetics": tables.kinetics,
    "ego4d": manifests.ego4d,
    "howto100m": tables.howto100m,
    "webdataset": containers.webdataset,
    "parquet": containers.parquet,
    "list": tables.plain_list,
    "jsonl": manifests.json_lines,
}
WITHOUT_CLIPS = ("imagefolder", "webdataset", "parquet")
IMAGE_COLUMN, LABEL_COLUMN = "image_column", "label_column"
COLUMNS = {"parquet": (IMAGE_COLUMN, LABEL_COLUMN), "kinetics": (LABEL_COLUMN,), "howto100m": (LABEL_COLUMN,)}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source as it was named: its kind, and where it is."""

    kind: str
    path: Path | RemotePath


def open_source(
    source: str,
    *,
    clips: Path | RemotePath | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Catalog:
    """The catalog of a source.

    Args:
        source: a folder, a file, or KIND:PATH with a kind of `KINDS`; on a disk or at a URL. A range of tars or
            parquet files is written `part-{000..099}.tar`.
        clips: the folder that holds what a manifest names; None is the manifest's own folder.
        split: only items of this split; in a folder tree, the folder of that name.
        image_column: of parquet files, the column with the bytes of images or videos; None is one with a usual name.
        label_column: of parquet files and CSVs, the column with the labels; None is one with a usual name.

    Raises:
        ConfigError: it doesn't exist, holds nothing to read, is malformed, or has no such split or column.
        PlaceError: it lies elsewhere and can't be reached.
    """
    place = recognise(source)
    if clips is not None:
        if place.kind in WITHOUT_CLIPS:
            raise ConfigError(f"{place.kind} names no clips elsewhere", where="--clips", fix="leave it out")
        if not clips.is_dir():
            raise ConfigError("no such folder", where=f"--clips {clips}", fix="check the path")
    named = _named(IMAGE_COLUMN, image_column, place) | _named(LABEL_COLUMN, label_column, place)
    if place.kind == "imagefolder":
        return _folder_split(place.path, split)
    catalog = KINDS[place.kind](place.path, clips or _folder_of(place.path), **named)
    if label_column and catalog.items and all(item.label is None for item in catalog.items):
        what, fix = f"column {label_column!r} holds no label", "name another one with --label-column"
        raise ConfigError(what, where=source, fix=fix)
    catalog = _only(catalog, split, source) if split is not None else catalog
    if not catalog.items:
        first = f"{catalog.skipped[0].id}: {catalog.skipped[0].reason}" if catalog.skipped else "it is empty"
        count = f"none of its {len(catalog.skipped)} entries" if catalog.skipped else "no entry"
        fix = "check the source" if place.kind in WITHOUT_CLIPS else "name the folder of the clips with --clips"
        raise ConfigError(f"{count} can be read (the first: {first})", where=source, fix=fix)
    return catalog


def _named(option: str, column: str | None, place: Source) -> dict[str, str]:
    """An opener's argument for a column that is named; none where it isn't."""
    if column is None:
        return {}
    if option not in COLUMNS.get(place.kind, ()):
        word = f"--{option.replace('_', '-')}"
        raise ConfigError(f"{place.kind} has no such column to name", where=f"{word} {column}", fix="leave it out")
    return {option: column}


def takes_clips(source: str) -> bool:
    """Whether a source names clips that lie elsewhere; see `recognise` for the errors."""
    return recognise(source).kind not in WITHOUT_CLIPS


def takes_column(source: str, option: Literal["image_column", "label_column"]) -> bool:
    """Whether a source has such a column that can be named; see `recognise` for the errors."""
    return option in COLUMNS.get(recognise(source).kind, ())


def recognise(source: str) -> Source:
    """The kind and path of a source.

    Raises:
        ConfigError: no such file or folder, or a file whose kind nobody knows.
    """
    kind, colon, rest = source.partition(":")
    whole = as_path(source)
    if colon and kind in KINDS and not (isinstance(whole, Path) and whole.exists()):
        if not _is_there(as_path(rest)):
            raise ConfigError("no such file or folder", where=rest, fix="check the path")
        return Source(kind=kind, path=as_path(rest))
    if not _is_there(whole):
        known = ", ".join(KINDS)
        said = colon and kind.isalnum() and isinstance(whole, Path)
        raise ConfigError("no such file or folder", where=source, fix=f"kinds: {known}" if said else "check the path")
    one = is_file(whole) or RANGE.search(whole.name)
    return Source(kind=_kind_of_file(whole) if one else _kind_of_folder(whole), path=whole)


def _is_there(path: Path | RemotePath) -> bool:
    return path.exists() or (path.parent / in_range(path.name)[0]).is_file()


def _kind_of_folder(folder: Path | RemotePath) -> str:
    """A folder with any image or video is a folder tree; one with tars or parquet files alone is those."""
    endings = set()
    for file in files_below(folder):
        ending = file.suffix.lower()
        if ending in IMAGE_ENDINGS or ending in VIDEO_ENDINGS or ending == ".gif":
            return "imagefolder"
        endings.add(".tar" if file.name.lower().endswith(TAR_ENDINGS) else ending)
    return "webdataset" if ".tar" in endings else "parquet" if ".parquet" in endings else "imagefolder"


def _kind_of_file(file: Path | RemotePath) -> str:
    ending = ".tar" if file.name.lower().endswith(TAR_ENDINGS) else file.suffix.lower()
    by_ending = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "jsonl", ".json": "ego4d", ".tsv": "list"}
    if ending in by_ending:
        return by_ending[ending]
    return tables.kind_of_text(file) if ending in (".csv", ".txt", ".lst", ".list") else "imagefolder"


def _folder_of(path: Path | RemotePath) -> Path | RemotePath:
    return path if path.is_dir() else path.parent


def _folder_split(folder: Path | RemotePath, split: str | None) -> Catalog:
    if split is None:
        return list_source(folder)
    if not (folder / split).is_dir():
        raise ConfigError(f"no folder {split!r} in it", where=folder, fix="check --split")
    catalog = list_source(folder / split)
    return replace(catalog, items=tuple(replace(item, split=split) for item in catalog.items))


def _only(catalog: Catalog, split: str, source: str) -> Catalog:
    items = tuple(item for item in catalog.items if item.split == split)
    if not items:
        known = ", ".join(sorted({item.split for item in catalog.items if item.split is not None})) or "none"
        raise ConfigError(f"no item of split {split!r}", where=source, fix=f"splits with items here: {known}")
    skipped = tuple(row for row in catalog.skipped if row.split in (None, split))
    return replace(catalog, items=items, skipped=skipped)
