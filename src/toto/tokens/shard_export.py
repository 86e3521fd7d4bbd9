"""Stores as what other software reads: WebDataset tars, or Parquet tables of codes.

* webdataset: `shard-NNNNN.tar`, for each item `NNNNNNNNN.npy` (uint16 `[T, rows, cols]`), `NNNNNNNNN.pixels.npy` (uint8
  `[T, H, W, 3]`, where the store has them) and `NNNNNNNNN.json` (id, kind, label, fps, stride). Keys are numbers, since
  WebDataset cuts names at their first dot. The same store gives the same bytes.
* parquet: `part-NNNNN.parquet`, a row for each item: id, kind, label, fps, stride, rows, cols and codes, a list of
  uint16 in raster order, frame after frame.

Beside them `export.json` has the passport and the files' checksums.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from toto.runtime.errors import ConfigError, InterruptedRunError
from toto.runtime.files import sha256_of, write_json
from toto.runtime.interrupt import stop_on_signal
from toto.runtime.progress import Progress
from toto.runtime.provenance import write_provenance
from toto.tokens.shard_tools import items_of, new_output
from toto.tokens.shards import StoredItem, TokenStore

Format = Literal["webdataset", "parquet"]
CODES_AT_ONCE = 8_000_000
COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "kind": pa.string(),
    "label": pa.string(),
    "fps": pa.float64(),
    "stride": pa.int32(),
    "rows": pa.int32(),
    "cols": pa.int32(),
    "codes": pa.list_(pa.uint16()),
}
SCHEMA = pa.schema(COLUMNS)


def export(store: TokenStore, out: Path, *, to: Format, items_in_file: int, config: Any) -> list[Path]:
    """Write a store in another format into a new folder; returns the data files.

    Args:
        store: the store.
        out: a folder that is not there, or empty.
        to: the format.
        items_in_file: at most so many items in a file.
        config: what is written into the folder's record.
    """
    if items_in_file < 1:
        raise ConfigError(f"must be at least 1, is {items_in_file}", where="--items-in-file")
    items = items_of(store)
    groups = [items[first : first + items_in_file] for first in range(0, len(items), items_in_file)]
    names = [f"shard-{n:05d}.tar" if to == "webdataset" else f"part-{n:05d}.parquet" for n in range(len(groups))]
    with (
        stop_on_signal() as stop,
        new_output(out) as aside,
        Progress("exporting", total=len(items), unit="items") as progress,
    ):
        first = 0
        for name, group in zip(names, groups, strict=True):
            written = (
                _write_tar(store, group, aside / name, first)
                if to == "webdataset"
                else _write_parquet(store, group, aside / name)
            )
            for count in written:
                progress.advance(count)
                if stop:
                    raise InterruptedRunError(
                        f"stopped by {stop.name}", where=out, fix="nothing was written; run it again"
                    )
            first += len(group)
        write_provenance(aside, config)
        record = {
            "format": to,
            "passport": store.passport.to_dict(),
            "stride": store.stride,
            "items": len(items),
            "ledger": store.manifest["ledger"],
            "files": [{"file": name, "sha256": sha256_of(aside / name)} for name in names],
        }
        write_json(aside / "export.json", record)
    return [out / name for name in names]


def _write_tar(store: TokenStore, items: list[StoredItem], path: Path, first: int) -> Iterator[int]:
    """Write items into a tar, from key `first` on, and count each; owner and times are zero."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, item in enumerate(items, start=first):
            _add(tar, f"{number:09d}.npy", _npy(store.frames(item.first_frame, item.frame_count)))
            if store.has_pixels:
                pixels = store.pixel_frames(item.first_frame, item.frame_count)
                _add(tar, f"{number:09d}.pixels.npy", _npy(pixels))
            named = {name: getattr(item, name) for name in ("id", "kind", "label", "fps", "stride")}
            _add(tar, f"{number:09d}.json", json.dumps(named, ensure_ascii=False).encode())
            yield 1


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write_parquet(store: TokenStore, items: list[StoredItem], path: Path) -> Iterator[int]:
    """Write items as rows, in groups of bounded size, and count each group."""
    rows, cols = store.grid
    with pq.ParquetWriter(path, SCHEMA) as writer:
        group: list[StoredItem] = []
        for item in items:
            group.append(item)
            if item is items[-1] or sum(each.frame_count for each in group) * rows * cols >= CODES_AT_ONCE:
                codes = [store.frames(each.first_frame, each.frame_count).reshape(-1) for each in group]
                ends = np.cumsum([0, *map(len, codes)]).astype(np.int32)
                columns: dict[str, Any] = {
                    name: pa.array([getattr(each, name) for each in group], SCHEMA.field(name).type)
                    for name in ("id", "kind", "label", "fps", "stride")
                }
                sides = {
                    name: pa.array([side] * len(group), pa.int32())
                    for name, side in zip(("rows", "cols"), store.grid, strict=True)
                }
                listed = pa.ListArray.from_arrays(
                    pa.array(ends, pa.int32()), pa.array(np.concatenate(codes), pa.uint16())
                )
                writer.write_table(pa.table({**columns, **sides, "codes": listed}, schema=SCHEMA))
                yield len(group)
                group = []
