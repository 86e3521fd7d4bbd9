"""Manifests with a clip a line: Kinetics, HowTo100M, plain lists."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from toto.media.catalog import Catalog
from toto.media.catalogs.entries import ClipFiles, Entries, bad_line, relative_to_clips, require_column
from toto.media.decode import IMAGE_ENDINGS, VIDEO_ENDINGS
from toto.runtime.errors import ConfigError
from toto.runtime.remote import RemotePath

NEGATIVE = re.compile(r"-\d+")
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
ID_COLUMNS = ("video_id", "vid", "youtube_id", "id")
LABEL_COLUMNS = ("label", "category_1")
PATH_HEADINGS = {"path", "file", "filename", "file_name", "image", "video"}
LABEL_HEADINGS = {"label", "class", "category"}


def kinetics(path: Path | RemotePath, clips: Path | RemotePath, *, label_column: str | None = None) -> Catalog:
    """Kinetics' own CSV (label, youtube_id, time_start, time_end, split), or `path label` a line.

    The label is a word or a whole number, after the last space (or comma); a negative one is none, and a heading
    `path label` is skipped. Clips of the CSV are looked for as `ID_SSSSSS_EEEEEE` and `ID`, in folders of classes or
    not, with any ending of a video.
    """
    first = next((words for _, words in _rows(path)), [])
    official = set(KINETICS_COLUMNS) <= set(first)
    _require_label(label_column, first if official else None, path)
    return _official(path, clips, label_column or "label") if official else _paths_and_labels(path, clips)


def _require_label(column: str | None, heading: list[str] | None, path: Path | RemotePath) -> None:
    """Refuse the name of a label column that a table hasn't got; `heading` None is a list without any."""
    if column is None:
        return
    if heading is None:
        raise ConfigError("its columns have no names", where=path, fix="leave --label-column out")
    require_column(column, heading, where=path, option="--label-column")


def _official(path: Path | RemotePath, clips: Path | RemotePath, labelled: str) -> Catalog:
    entries, files = Entries("kinetics"), ClipFiles(clips)
    for line, row in _records(path, KINETICS_COLUMNS):
        try:
            start, end = (int(float(row[name])) for name in KINETICS_COLUMNS[1:])
        except ValueError:
            times = f"{row['time_start']!r}, {row['time_end']!r}"
            raise bad_line(path, line, f"times {times} are no numbers") from None
        video, label, split = row["youtube_id"], row.get(labelled) or None, row.get("split") or None
        if not video:
            raise bad_line(path, line, "no youtube_id")
        stems = (f"{video}_{start:06d}_{end:06d}", f"{video}_{start}_{end}", video)
        found = files.find(*stems, folders=(label, split))
        entries.add(stems[0], found, line=line, wanted=f"{stems[0]}.* or {video}.*", label=label, split=split)
    return entries.catalog()


def _paths_and_labels(path: Path | RemotePath, clips: Path | RemotePath) -> Catalog:
    entries = Entries("kinetics")
    for place, (line, text) in enumerate(_lines(path)):
        if not place and _is_heading(text):
            continue
        name, separator, label = text.rpartition(" ") if " " in text else text.rpartition(",")
        if not separator or not name.strip() or not label:
            raise bad_line(path, line, f"{text[:60]!r} is no path and label with a space between them")
        name = name.strip().strip('"')
        known = None if NEGATIVE.fullmatch(label.strip()) else label
        entries.add(name, relative_to_clips(name, clips, path), line=line, label=known)
    return entries.catalog()


def howto100m(path: Path | RemotePath, clips: Path | RemotePath, *, label_column: str | None = None) -> Catalog:
    """A CSV with a column video_id (its category_1 is the label), or an id a line; files by id, with any ending."""
    entries, files = Entries("howto100m"), ClipFiles(clips)
    first = next((words for _, words in _rows(path)), [])
    column = next((name for name in ID_COLUMNS if name in first), None)
    _require_label(label_column, first if column else None, path)
    labelled = (label_column,) if label_column else LABEL_COLUMNS
    if column:
        named = _records(path, (column,))
    else:
        named = ((line, {"": text.split(",")[0].strip()}) for line, text in _lines(path))
    for line, row in named:
        video = row[column or ""]
        if not video:
            raise bad_line(path, line, "no video id")
        label = next((row[name] for name in labelled if row.get(name)), None)
        stem = video.removesuffix(Path(video).suffix) if Path(video).suffix.lower() in VIDEO_ENDINGS else video
        entries.add(stem, files.find(stem), line=line, wanted=f"{stem}.*", label=label, split=row.get("split") or None)
    return entries.catalog()


def plain_list(path: Path | RemotePath, clips: Path | RemotePath) -> Catalog:
    """A path a line, with a label after a tab or without."""
    entries = Entries("list")
    for line, text in _lines(path):
        name, _, label = text.partition("\t")
        if not name:
            raise bad_line(path, line, "no path before the tab")
        entries.add(name, relative_to_clips(name, clips, path), line=line, label=label.strip() or None)
    return entries.catalog()


def kind_of_text(path: Path | RemotePath) -> str:
    """Which kind of manifest a text file is, by its first line.

    Raises:
        ConfigError: it is empty, or like none of them.
    """
    line = next((text for _, text in _lines(path)), "")
    columns = {word.strip().strip('"') for word in line.split(",")}
    if set(KINETICS_COLUMNS) <= columns:
        return "kinetics"
    if columns & set(ID_COLUMNS):
        return "howto100m"
    if not line:
        raise ConfigError("is empty", where=path, fix="name a list with a file a line")
    if _is_heading(line):
        return "kinetics"
    before_label = line.rpartition(" ")[0] or line.rpartition(",")[0]
    if _is_media(line.partition("\t")[0]):
        return "list"
    if _is_media(before_label.strip().strip('"')):
        return "kinetics"
    if " " not in line and "/" not in line:
        return "howto100m"
    raise ConfigError("nobody knows this kind of list", where=path, fix=f"write KIND:{path}, as list:{path}")


def _is_heading(line: str) -> bool:
    """Whether a line says `path label` instead of a path and a label."""
    words = line.lower().replace(",", " ").replace('"', " ").split()
    return len(words) == 2 and words[0] in PATH_HEADINGS and words[1] in LABEL_HEADINGS


def _is_media(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_ENDINGS | IMAGE_ENDINGS | {".gif"}


def _lines(path: Path | RemotePath) -> Iterator[tuple[int, str]]:
    """The lines of a file that say something, with their numbers from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.strip("\r\n ")
    except UnicodeDecodeError:
        raise ConfigError("is no text in UTF-8", where=path, fix="check the path, or convert it") from None


def _rows(path: Path | RemotePath) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for words in reader:
                if words:
                    yield reader.line_num, [word.strip() for word in words]
    except UnicodeDecodeError:
        raise ConfigError("is no text in UTF-8", where=path, fix="check the path, or convert it") from None
    except csv.Error as error:
        raise bad_line(path, reader.line_num, str(error)) from None


def _records(path: Path | RemotePath, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows below the heading, by the names of their columns."""
    rows = _rows(path)
    _, heading = next(rows)
    for line, words in rows:
        if len(words) < max(heading.index(name) for name in needed) + 1 or len(words) > len(heading):
            raise bad_line(path, line, f"{len(words)} values for the columns {', '.join(heading)}")
        yield line, dict(zip(heading, words, strict=False))
