"""Which kind of source this is, by its form or by name, and its catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from toto.media.catalog import Catalog, files_below, list_source
from toto.media.catalogs import containers, manifests, tables
from toto.media.decode import IMAGE_ENDINGS, VIDEO_ENDINGS
from toto.runtime.errors import ConfigError

Opener = Callable[[Path, Path], Catalog]  # the source, and the folder of its clips


def _folder(path: Path, _clips: Path) -> Catalog:
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


@dataclass(frozen=True, kw_only=True)
class Place:
    """A source as it was named: its kind, and where it is."""

    kind: str
    path: Path


def open_source(source: str, *, clips: Path | None = None, split: str | None = None) -> Catalog:
    """The catalog of a source.

    Args:
        source: a folder, a file, or KIND:PATH with a kind of `KINDS`.
        clips: the folder that holds what a manifest names; None is the manifest's own folder.
        split: only items of this split; in a folder tree, the folder of that name.

    Raises:
        ConfigError: it doesn't exist, holds nothing to read, is malformed, or has no such split.
    """
    place = recognise(source)
    if clips is not None:
        if place.kind in WITHOUT_CLIPS:
            raise ConfigError(f"{place.kind} names no clips elsewhere", where="--clips", fix="leave it out")
        if not clips.is_dir():
            raise ConfigError("no such folder", where=f"--clips {clips}", fix="check the path")
    if place.kind == "imagefolder":
        return _folder_split(place.path, split)
    catalog = KINDS[place.kind](place.path, clips or _folder_of(place.path))
    catalog = _only(catalog, split, source) if split is not None else catalog
    if not catalog.items:
        first = f"{catalog.skipped[0].id}: {catalog.skipped[0].reason}" if catalog.skipped else "it is empty"
        count = f"none of its {len(catalog.skipped)} entries" if catalog.skipped else "no entry"
        fix = "check the source" if place.kind in WITHOUT_CLIPS else "name the folder of the clips with --clips"
        raise ConfigError(f"{count} can be read (the first: {first})", where=source, fix=fix)
    return catalog


def recognise(source: str) -> Place:
    """The kind and path of a source.

    Raises:
        ConfigError: no such file or folder, or a file whose kind nobody knows.
    """
    kind, colon, rest = source.partition(":")
    whole = Path(source)
    if colon and kind in KINDS and not whole.exists():
        if not Path(rest).exists():
            raise ConfigError("no such file or folder", where=rest, fix="check the path")
        return Place(kind=kind, path=Path(rest))
    if not whole.exists():
        known = ", ".join(KINDS)
        fix = f"kinds: {known}" if colon and kind.isalnum() else "check the path"
        raise ConfigError("no such file or folder", where=source, fix=fix)
    return Place(kind=_kind_of_folder(whole) if whole.is_dir() else _kind_of_file(whole), path=whole)


def _kind_of_folder(folder: Path) -> str:
    """A folder with any image or video is a folder tree; one with tars or parquet files alone is those."""
    endings = set()
    for file in files_below(folder):
        ending = file.suffix.lower()
        if ending in IMAGE_ENDINGS or ending in VIDEO_ENDINGS or ending == ".gif":
            return "imagefolder"
        endings.add(ending)
    return "webdataset" if ".tar" in endings else "parquet" if ".parquet" in endings else "imagefolder"


def _kind_of_file(file: Path) -> str:
    ending = file.suffix.lower()
    by_ending = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "jsonl", ".json": "ego4d", ".tsv": "list"}
    if ending in by_ending:
        return by_ending[ending]
    return tables.kind_of_text(file) if ending in (".csv", ".txt", ".lst", ".list") else "imagefolder"


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _folder_split(folder: Path, split: str | None) -> Catalog:
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
    return replace(catalog, items=items)
