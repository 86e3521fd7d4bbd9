"""Items to clips, wherever their bytes lie: a file, some seconds of one, inside a tar, in a row of a parquet file."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from toto.media.catalog import Bytes, Item, Row, Seconds
from toto.media.clip import Clip
from toto.media.decode import OpenFile, Window, read_image, stream_video, stream_windows
from toto.media.fetched import fetched_bytes, fetched_file
from toto.media.unpacked import compression, open_tar
from toto.runtime.errors import MediaError
from toto.runtime.remote import RemotePath

ROWS_AT_ONCE = 16


def stream_item(item: Item, *, stride: int = 1, offset: int = 0, limit: int | None = None) -> Iterator[Clip]:
    """Frames `offset, offset + stride, ...` of a video or of its window, or an image as a clip of one frame.

    With `limit`, at most so many of a video (of a window, at least so many where it has them: the last clip is whole).

    Raises:
        MediaError: see `toto.media.decode.read_media`.
    """
    if isinstance(item.part, Seconds):
        for _, clip in stream_unit([item], stride=stride, offsets=[offset]):
            if isinstance(clip, MediaError):
                raise clip
            yield clip
        return
    place = open_item(item)
    try:
        if item.kind == "image":
            yield read_image(place, source=item.id)
        else:
            yield from stream_video(place, stride=stride, offset=offset, limit=limit, source=item.id)
    finally:
        if not isinstance(place, Path):
            place.close()


def read_item(item: Item, *, stride: int = 1, offset: int = 0, limit: int | None = None) -> Clip:
    """The frames of `stream_item` in one clip, at most `limit` of them.

    Raises:
        MediaError: see `toto.media.decode.read_media`.
    """
    clips, count = [], 0
    for clip in stream_item(item, stride=stride, offset=offset, limit=limit):
        clips.append(clip)
        count += len(clip)
        if limit is not None and count >= limit:
            break
    return Clip(
        frames=torch.cat([clip.frames for clip in clips])[:limit],
        indices=torch.cat([clip.indices for clip in clips])[:limit],
        timestamps=torch.cat([clip.timestamps for clip in clips])[:limit],
        source=item.id,
        rate=clips[0].rate,
    )


def stream_unit(
    items: Sequence[Item], *, stride: int, offsets: Sequence[int]
) -> Iterator[tuple[int, Clip | MediaError]]:
    """Windows of one file in one pass; see `toto.media.decode.stream_windows` for what comes."""
    windows = [
        Window(start=item.part.start, end=item.part.end, offset=offset)
        for item, offset in zip(items, offsets, strict=True)
        if isinstance(item.part, Seconds)
    ]
    try:
        place = _on_disk(items[0])
    except MediaError as error:
        yield from ((number, error) for number in range(len(items)))
        return
    yield from stream_windows(place, windows, stride=stride, source=items[0].id)


def open_item(item: Item) -> Path | OpenFile:
    """Where a decoder reads an item: its file, or an open one that the caller closes.

    What lies elsewhere is fetched first (`toto.media.fetched`).

    Raises:
        MediaError: the file or the row that holds it can't be read.
        PlaceError: it lies elsewhere and can't be reached.
    """
    if isinstance(item.part, Bytes):
        if isinstance(item.path, RemotePath) and compression(item.path) is None:
            return fetched_bytes(item.path, item.part.offset, item.part.size, source=item.id)
        try:
            return io.BufferedReader(_Section(item.path, item.part))
        except OSError as error:
            raise MediaError(f"its tar can't be read ({error.strerror})", where=item.id, fix="restore it") from None
    if isinstance(item.part, Row):
        return io.BytesIO(_row_bytes(item, item.part))
    return _on_disk(item)


def _on_disk(item: Item) -> Path:
    return fetched_file(item.path, source=item.id) if isinstance(item.path, RemotePath) else item.path


class _Section(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, path: Path | RemotePath, part: Bytes):
        self._file = open_tar(path).detach()
        self._part, self._place = part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._part.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        left = max(0, min(len(buffer), self._part.size - self._place))
        self._file.seek(self._part.offset + self._place)
        read = self._file.readinto(memoryview(buffer)[:left])
        self._place += read
        return read

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _RowReader:
    """Reads rows of one column of a parquet file; rows in rising order are read in one pass, a few at a time."""

    def __init__(self, path: Path | RemotePath, column: str):
        self.key = path, column
        self._file = pq.ParquetFile(path if isinstance(path, Path) else path.open("rb"))
        self._column = column
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.Array[Any] | None = None
        self._first, self._group = 0, -1

    def bytes_of(self, number: int) -> bytes | None:
        """The bytes in a row; None where it has none."""
        group, first = self._group_of(number)
        if group != self._group or number < self._first:
            columns = [self._column]
            self._batches = self._file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
            self._batch, self._first, self._group = None, first, group
        while self._batch is None or number >= self._first + len(self._batch):
            self._first += 0 if self._batch is None else len(self._batch)
            self._batch = next(self._batches).column(0)
        value = self._batch[number - self._first].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _group_of(self, number: int) -> tuple[int, int]:
        """The row group that a row lies in, and the number of its first row."""
        first = 0
        for group in range(self._file.metadata.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if number < first + rows:
                return group, first
            first += rows
        raise IndexError(f"row {number} of {first}")


_last_reader: list[_RowReader] = []  # one open file a process


def _row_bytes(item: Item, row: Row) -> bytes:
    try:
        if not _last_reader or _last_reader[0].key != (item.path, row.column):
            _last_reader[:] = [_RowReader(item.path, row.column)]
        found = _last_reader[0].bytes_of(row.number)
    except (OSError, pa.ArrowException, StopIteration, IndexError, KeyError) as error:
        _last_reader.clear()
        reason = " ".join(str(error).split())
        raise MediaError(f"its row can't be read ({reason})", where=item.id, fix="restore the file") from None
    if not found:
        raise MediaError("missing: its row holds no bytes", where=item.id, fix="embed the files in the parquet file")
    return found
