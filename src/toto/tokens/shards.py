"""Shards: token frames on disk, memory-mapped, 2 bytes a token.

A store is a folder:

    manifest.json      passport, stride, counts, checksums; written last, so a store with it is whole
    frames-NNNNN.npy   uint16 [F, rows, cols], items one after another, never split over files
    items.parquet      a row per kept item: id, kind, label, first_frame, frame_count, fps, stride
    ledger.parquet     a row per offered input: id, kind, status, reason, frames

Frames are stored at the tokenizing stride and windows are cut when they are read, so one store serves any T.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64
from torch import Tensor

from toto.media.decode import Kind
from toto.media.ledger import LedgerRow
from toto.runtime.errors import StoreError
from toto.runtime.files import read_json, sha256_of, write_json, written_aside
from toto.tokens.passport import Passport

FORMAT, VERSION = "toto-shards", 1
MANIFEST, ITEMS, LEDGER = "manifest.json", "items.parquet", "ledger.parquet"
Codes = npt.NDArray[np.uint16]

ITEM_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "kind": pa.string(),
    "label": pa.string(),
    "first_frame": pa.int64(),
    "frame_count": pa.int64(),
    "fps": pa.float64(),
    "stride": pa.int32(),
}
LEDGER_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "kind": pa.string(),
    "status": pa.string(),
    "reason": pa.string(),
    "frames": pa.int64(),
}
ITEM_SCHEMA, LEDGER_SCHEMA = pa.schema(ITEM_COLUMNS), pa.schema(LEDGER_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class StoredItem:
    """One item of a store; `first_frame` counts over all its files."""

    id: str
    kind: Kind
    label: str | None
    first_frame: int
    frame_count: int
    fps: float
    stride: int


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"frames-{number:05d}.npy"


def write_shard(folder: Path, number: int, codes: list[Codes], grid: tuple[int, int]) -> dict[str, Any]:
    """Write one shard aside and rename it; returns its entry for the manifest."""
    path = folder / shard_name(number)
    whole = np.concatenate([np.empty((0, *grid), np.uint16), *codes])
    with written_aside(path) as aside, aside.open("wb") as handle:
        np.save(handle, whole, allow_pickle=False)
    return {"file": path.name, "frames": len(whole), "sha256": sha256_of(path)}


def finish_store(
    folder: Path,
    *,
    passport: Passport,
    stride: int,
    shards: list[dict[str, Any]],
    items: list[StoredItem],
    counts: dict[str, int],
    job: dict[str, Any],
) -> None:
    """Write the items and, last, the manifest that makes the store whole; the ledger is there by then."""
    _write_table(folder / ITEMS, ITEM_SCHEMA, items)
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "passport": passport.to_dict(),
            "stride": stride,
            "frames": sum(shard["frames"] for shard in shards),
            "items": len(items),
            "classes": sorted({item.label for item in items if item.label is not None}),
            "ledger": counts,
            "shards": shards,
            "tables": {name: sha256_of(folder / name) for name in (ITEMS, LEDGER)},
            "job": job,
        },
    )


class TokenStore:
    """A finished store, opened for reading. Opening reads the tables; frames are mapped when they are asked for.

    Raises:
        StoreError: the folder is no finished store, or a file of it is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise StoreError("no such shard folder", where=self.folder, fix="make it with `toto tokenize`")
        manifest = read_json(self.folder / MANIFEST, what="shard manifest (the store is unfinished or not a store)")
        if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise StoreError(f"not a {FORMAT} store of version {VERSION}", where=self.folder, fix="make it again")
        self.manifest = manifest
        self.passport = Passport.from_dict(manifest["passport"], where=str(self.folder))
        self.stride = int(manifest["stride"])
        self._maps: dict[int, Codes] = {}
        self._firsts = [0]
        for shard in manifest["shards"]:
            self._firsts.append(self._firsts[-1] + shard["frames"])

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r}, {len(self)} items, {self.frame_count} frames, grid {self.grid})"

    def __len__(self) -> int:
        return int(self.manifest["items"])

    @property
    def frame_count(self) -> int:
        """Token frames in all files."""
        return self._firsts[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        assert self.passport.grid is not None
        return self.passport.grid

    @cached_property
    def table(self) -> pa.Table:
        """The items as an Arrow table."""
        path = self.folder / ITEMS
        try:
            return pq.read_table(path, schema=ITEM_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"items can't be read ({error})", where=path, fix="make the store again") from None

    def column(self, name: str) -> npt.NDArray[Any]:
        """A numeric column of the items."""
        column: npt.NDArray[Any] = self.table.column(name).to_numpy()
        return column

    def item(self, number: int) -> StoredItem:
        """One item by its place in the table."""
        return StoredItem(**{name: self.table.column(name)[number].as_py() for name in ITEM_SCHEMA.names})

    def frames(self, first: int, count: int) -> Codes:
        """Frames `first .. first + count - 1`, all in one file, as a view of the mapped file."""
        number = bisect.bisect_right(self._firsts, first) - 1
        if first < 0 or number >= len(self._firsts) - 1 or first + count > self._firsts[number + 1]:
            last = first + count - 1
            raise StoreError(f"frames {first} to {last} are not in one file of it", where=self.folder)
        start = first - self._firsts[number]
        return self._map(number)[start : start + count]

    def codes(self, number: int, start: int = 0, count: int | None = None) -> Int64[Tensor, "T rows cols"]:
        """Codes of an item's frames `start .. start + count - 1` as int64."""
        first, total = int(self.column("first_frame")[number]), int(self.column("frame_count")[number])
        wanted = total - start if count is None else count
        return torch.from_numpy(self.frames(first + start, wanted).astype(np.int64))

    def verify(self) -> None:
        """Read every byte and compare it with the manifest's checksums."""
        sums = {shard["file"]: shard["sha256"] for shard in self.manifest["shards"]} | self.manifest["tables"]
        for name, expected in sums.items():
            path = self.folder / name
            if not path.exists() or sha256_of(path) != expected:
                state = "damaged" if path.exists() else "missing"
                raise StoreError(f"{state} (checksum of the manifest)", where=path, fix="make the store again")

    def _map(self, number: int) -> Codes:
        if number not in self._maps:
            shard = self.manifest["shards"][number]
            path = self.folder / shard["file"]
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise StoreError(f"can't be read ({error})", where=path, fix="make the store again") from None
            expected = (shard["frames"], *self.grid)
            if mapped.shape != expected or mapped.dtype != np.uint16:
                found = f"{mapped.dtype} {mapped.shape}"
                raise StoreError(f"holds {found}, the manifest says uint16 {expected}", where=path, fix="make it again")
            self._maps[number] = mapped
        return self._maps[number]


def write_ledger(folder: Path, ledger: list[LedgerRow]) -> None:
    """Write the ledger of a store."""
    _write_table(folder / LEDGER, LEDGER_SCHEMA, ledger)


def read_ledger(folder: Path) -> list[LedgerRow]:
    """The ledger of a store."""
    return [LedgerRow(**row) for row in pq.read_table(folder / LEDGER).to_pylist()]


def _write_table(path: Path, schema: pa.Schema, rows: list[Any]) -> None:
    table = pa.Table.from_pylist([vars(row) for row in rows], schema=schema)
    with written_aside(path) as aside:
        pq.write_table(table, aside)
