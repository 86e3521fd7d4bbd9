"""Manifests in JSON: Ego4D, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toto.media.catalog import Catalog, Seconds
from toto.media.catalogs.entries import ClipFiles, Entries, bad_line, relative_to_clips
from toto.runtime.errors import ConfigError
from toto.runtime.remote import RemotePath

STARTS = ("video_start_sec", "parent_start_sec", "clip_start_sec", "start_sec")
ENDS = ("video_end_sec", "parent_end_sec", "clip_end_sec", "end_sec")
LIST_NAMES = ("clips", "videos")
Record = dict[str, Any]


def ego4d(path: Path | RemotePath, clips: Path | RemotePath) -> Catalog:
    """Ego4D's JSON: videos or clips with their uids, also clips inside videos; files are `UID.mp4` below `clips`.

    A clip without a file of its own is cut from its video where that is there.
    """
    entries, files = Entries("ego4d", counted="entry"), ClipFiles(clips)
    for number, (record, parent) in enumerate(_ego4d_records(path), start=1):
        clip = _text(record, "clip_uid")
        video = _text(record, "video_uid") or _text(parent, "video_uid") or _text(record, "uid")
        uid = clip or video
        if not uid:
            raise ConfigError(f"entry {number}: neither clip_uid nor video_uid", where=path, fix="mend the entry")
        found, part = files.find(uid), None
        window = _window(record) if clip and not found else None
        if window and video and (whole := files.find(video)):
            found, part = whole, window
        split = _text(record, "split") or _text(parent, "split")
        label = _text(record, "label")
        entries.add(uid, found, line=number, wanted=f"{uid}.*", label=label, split=split, part=part)
    return entries.catalog()


def json_lines(path: Path | RemotePath, clips: Path | RemotePath) -> Catalog:
    """A JSON object a line: path, and where wanted label, start and end (seconds), id, split; other keys are ignored.

    Several windows of one file are read in one pass. Without an id, a window is called `PATH@START-END`.
    """
    entries = Entries("jsonl")
    with path.open(encoding="utf-8-sig") as file:
        for line, record in _objects(file, path):
            name = _text(record, "path")
            if not name:
                raise bad_line(path, line, "no path")
            part = _seconds(record, path, line)
            id = _text(record, "id") or (name if part is None else f"{name}@{_times(part)}")
            split, label = _text(record, "split"), _label(record, path, line)
            place = relative_to_clips(name, clips, path)
            entries.add(id, place, line=line, label=label, split=split, part=part)
    return entries.catalog()


def _ego4d_records(path: Path | RemotePath) -> Iterator[tuple[Record, Record]]:
    """Entries, each with the one it lies in (or an empty one)."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise bad_line(path, error.lineno, f"is no JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ConfigError("is no text in UTF-8", where=path, fix="check the path") from None
    if isinstance(whole, dict):
        whole = next((whole[name] for name in LIST_NAMES if isinstance(whole.get(name), list)), None)
    if not isinstance(whole, list) or not all(isinstance(record, dict) for record in whole):
        raise ConfigError(
            "holds no list of videos or clips", where=path, fix="give Ego4D's manifest, or write KIND:PATH"
        )
    for record in whole:
        inside = record.get("clips")
        if isinstance(inside, list) and inside and all(isinstance(clip, dict) for clip in inside):
            yield from ((clip, record) for clip in inside)
        else:
            yield record, {}


def _objects(file: Any, path: Path | RemotePath) -> Iterator[tuple[int, Record]]:
    line = 0
    try:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            record = json.loads(text)
            if not isinstance(record, dict):
                raise bad_line(path, line, "is no JSON object")
            yield line, record
    except json.JSONDecodeError as error:
        raise bad_line(path, line, f"is no JSON ({error.msg} at character {error.pos + 1})") from None
    except UnicodeDecodeError:
        raise bad_line(path, line + 1, "is no text in UTF-8") from None


def _text(record: Record, name: str) -> str | None:
    value = record.get(name)
    return value if isinstance(value, str) and value else None


def _label(record: Record, path: Path | RemotePath, line: int) -> str | None:
    value = record.get("label")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise bad_line(path, line, f"label {json.dumps(value)[:60]} is neither a word nor a whole number")
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seconds(record: Record, path: Path | RemotePath, line: int) -> Seconds | None:
    start, end = record.get("start"), record.get("end")
    if start is None and end is None:
        return None
    for value in (start, end):
        if value is not None and not _is_number(value):
            raise bad_line(path, line, f"{json.dumps(value)[:60]} is no number of seconds")
    try:
        return Seconds(start=float(start or 0), end=None if end is None else float(end))
    except ConfigError as error:
        raise bad_line(path, line, error.what) from None


def _window(record: Record) -> Seconds | None:
    """The seconds of its video that an Ego4D clip is, where they are given and hold something."""
    start = next((record[name] for name in STARTS if _is_number(record.get(name))), None)
    end = next((record[name] for name in ENDS if _is_number(record.get(name))), None)
    if start is None or end is None or not 0 <= start < end:
        return None
    return Seconds(start=float(start), end=float(end))


def _times(part: Seconds) -> str:
    """Start and end for an id: "12.5-20", or "12.5-" where it reaches to the end."""
    return f"{part.start:.9g}-" + ("" if part.end is None else f"{part.end:.9g}")
