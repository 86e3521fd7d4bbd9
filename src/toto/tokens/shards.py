"""Shards: token frames on disk, memory-mapped, 2 bytes a token.

A store is a folder:

    manifest.json      passport, stride, counts, checksums; written last, so a store with it is whole
    frames-NNNNN.npy   uint16 [F, rows, cols], items one after another, never split over files
    pixels-NNNNN.npy   uint8 [F, H, W, 3], the frames that were tokenized; only where they were asked for
    items.parquet      a row per kept item: id, kind, label, first_frame, frame_count, fps, stride
    ledger.parquet     a row per offered input: id, kind, status, reason, frames
    splits.parquet     a row per kept item: id, split; only where the source names splits

Frames are stored at the tokenizing stride and windows are cut when they are read, so one store serves any T.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from toto.media.decode import Kind
from toto.media.ledger import LedgerRow
from toto.runtime.errors import ConfigError, StoreError
from toto.runtime.files import read_json, sha256_of, write_json, written_aside
from toto.runtime.places import as_path, sha256_at
from toto.runtime.remote import RemotePath
from toto.tokens.kept_files import KeptFiles
from toto.tokens.passport import Passport

FORMAT, VERSION = "toto-shards", 1
MANIFEST, ITEMS, LEDGER, SPLITS = "manifest.json", "items.parquet", "ledger.parquet", "splits.parquet"
ONLINE = "online"  # of a job: where the items are, of a store that holds no codes of them
SEAL = "sha256"  # of the manifest, in it; stores of before have none
FEW_RUNS, LARGE_RUN = 4, 2048  # from here on, one slice a run is faster than one index over all of them
Codes = npt.NDArray[np.uint16]
Pixels = npt.NDArray[np.uint8]
Verify = Literal["never", "read"]

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
SPLIT_SCHEMA = pa.schema([("id", pa.string()), ("split", pa.string())])
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


def pixels_name(number: int) -> str:
    """File name of a shard's pixels."""
    return f"pixels-{number:05d}.npy"


def write_shard(folder: Path, number: int, codes: list[Codes], grid: tuple[int, int]) -> dict[str, Any]:
    """Write one shard aside and rename it; returns its entry for the manifest."""
    path = folder / shard_name(number)
    whole = np.concatenate([np.empty((0, *grid), np.uint16), *codes])
    with written_aside(path) as aside, aside.open("wb") as handle:
        np.save(handle, whole, allow_pickle=False)
    return {"file": path.name, "frames": len(whole), "sha256": sha256_of(path)}


def write_pixels(folder: Path, number: int, clips: Iterable[Pixels], shape: tuple[int, int, int]) -> dict[str, Any]:
    """Write the pixels `[F, H, W, 3]` of a shard's frames, clip after clip, so that one clip is in memory at most.

    Args:
        folder: the store's.
        number: of the shard.
        clips: frames uint8 `[T, H, W, 3]`, in the order of the shard's codes.
        shape: F, H and W.

    Returns:
        What the shard's entry in the manifest gets as "pixels".
    """
    path = folder / pixels_name(number)
    header = {"descr": "|u1", "fortran_order": False, "shape": (*shape, 3)}
    with written_aside(path) as aside, aside.open("wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        frames = 0
        for clip in clips:
            handle.write(np.ascontiguousarray(clip).data)
            frames += len(clip)
        if frames != shape[0]:
            raise StoreError(f"{frames} frames of pixels for {shape[0]} frames of codes", where=path)
    return {"file": path.name, "sha256": sha256_of(path)}


def finish_store(
    folder: Path,
    *,
    passport: Passport,
    stride: int,
    shards: list[dict[str, Any]],
    items: list[StoredItem],
    counts: dict[str, int],
    job: dict[str, Any],
    classes: Sequence[str] | None = None,
) -> None:
    """Write the items and, last, the manifest that makes the store whole; ledger and splits are there by then."""
    _write_table(folder / ITEMS, ITEM_SCHEMA, items)
    manifest = sealed(
        {
            "format": FORMAT,
            "version": VERSION,
            "passport": passport.to_dict(),
            "stride": stride,
            "frames": sum(item.frame_count for item in items),
            "items": len(items),
            "classes": in_order({item.label for item in items if item.label is not None}, classes or ()),
            "ledger": counts,
            "shards": shards,
            "tables": {name: sha256_of(folder / name) for name in (ITEMS, LEDGER, SPLITS) if (folder / name).exists()},
            "job": job,
        }
    )
    write_json(folder / MANIFEST, manifest)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of all else that it says."""
    said = {name: value for name, value in manifest.items() if name != SEAL}
    return said | {SEAL: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def in_order(labels: Collection[str], known: Sequence[str]) -> list[str]:
    """Class names: those of a source's own order first, all of them, then other labels by the alphabet."""
    return [*known, *sorted(set(labels) - set(known))]


def write_splits(folder: Path, splits: Mapping[str, str | None]) -> None:
    """Write which split each item is of, where any is named."""
    if any(splits.values()):
        rows = [{"id": name, "split": split} for name, split in splits.items()]
        with written_aside(folder / SPLITS) as aside:
            pq.write_table(pa.Table.from_pylist(rows, schema=SPLIT_SCHEMA), aside)


def read_splits(folder: Path | RemotePath) -> dict[str, str | None]:
    """The split of each item of a store by its id; empty where its source named none."""
    if not (folder / SPLITS).is_file():
        return {}
    table = pq.read_table(_readable(folder / SPLITS), schema=SPLIT_SCHEMA)
    return {row["id"]: row["split"] for row in table.to_pylist()}


class TokenStore:
    """A finished store, opened for reading: nothing but the manifest is read before it is asked for.

    Columns of the items are read one by one and stay NumPy or Arrow arrays, so a store of a million items opens in a
    moment; frames are mapped file by file. Files of a store at a URL are fetched when they are first needed, checked,
    and kept in a bounded folder of this machine (`toto.runtime.cache`).

    Args:
        folder: the store's, or its URL.
        verify: "read" compares every file with its checksum before anything of it is handed out, once.

    Raises:
        StoreError: the folder is no finished store, or a file of it is missing, damaged or of another size.
        PlaceError: the URL can't be reached.
    """

    def __init__(self, folder: str | Path | RemotePath, *, verify: Verify = "never"):
        self.folder, self._verify = as_path(folder), verify
        if isinstance(self.folder, Path) and not self.folder.is_dir():
            raise StoreError("no such shard folder", where=self.folder, fix="make it with `toto tokenize`")
        manifest = read_json(self.folder / MANIFEST, what="shard manifest (the store is unfinished or not a store)")
        if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise StoreError(f"not a {FORMAT} store of version {VERSION}", where=self.folder, fix="make it again")
        if SEAL in manifest and manifest != sealed(manifest):
            raise StoreError("damaged (its own checksum)", where=self.folder / MANIFEST, fix="make the store again")
        self.manifest = manifest
        self.passport = Passport.from_dict(manifest["passport"], where=str(self.folder))
        self.stride = int(manifest["stride"])
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._checked: set[str] = set()  # files that were compared with their checksums
        self._firsts = np.cumsum([0, *(shard["frames"] for shard in manifest["shards"])])
        self._kept = KeptFiles(self.folder, self.checksums) if isinstance(self.folder, RemotePath) else None
        if self._kept:
            self._kept.warn_if_larger(2 * int(self._firsts[-1]) * math.prod(self.grid), "its codes take")

    def __repr__(self) -> str:
        return f"TokenStore({str(self.folder)!r}, {len(self)} items, {self.frame_count} frames, grid {self.grid})"

    def __len__(self) -> int:
        return int(self.manifest["items"])

    @property
    def frame_count(self) -> int:
        """Token frames of all items."""
        return int(self.manifest["frames"])

    @property
    def is_online(self) -> bool:
        """Whether there are no codes on disk: they are made when they are read (`toto.tokens.online`)."""
        return ONLINE in self.manifest["job"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame."""
        assert self.passport.grid is not None
        return self.passport.grid

    @cached_property
    def table(self) -> pa.Table:
        """The items as an Arrow table."""
        return self._read_items(ITEM_SCHEMA.names)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A numeric column of the items."""
        if name not in self._columns:
            column: npt.NDArray[Any] = self._read_items([name]).column(0).to_numpy()
            self._columns[name] = column
        return self._columns[name]

    def is_kind(self, kind: Kind) -> npt.NDArray[np.bool_]:
        """Which items are of this kind."""
        found: npt.NDArray[np.bool_] = pc.equal(self._read_items(["kind"]).column(0), pa.scalar(kind)).to_numpy()
        return found

    def item(self, number: int) -> StoredItem:
        """One item by its place in the table."""
        return StoredItem(**{name: self.table.column(name)[number].as_py() for name in ITEM_SCHEMA.names})

    def frames(self, first: int, count: int) -> Codes:
        """Frames `first .. first + count - 1`, all in one file, as a view of the mapped file."""
        shard, start = self._place(first, count)
        return self._codes_of(shard)[start : start + count]

    def pixel_frames(self, first: int, count: int) -> Pixels:
        """Pixels of frames `first .. first + count - 1`, as `frames` gives their codes.

        Raises:
            ConfigError: the store was made without them.
        """
        self.require_pixels()
        shard, start = self._place(first, count)
        return self._pixels_of(shard)[start : start + count]

    def codes(self, number: int, start: int = 0, count: int | None = None) -> Int64[Tensor, "T rows cols"]:
        """Codes of an item's frames `start .. start + count - 1` as int64."""
        return torch.from_numpy(self.frames(*self._frames_of(number, start, count)).astype(np.int64))

    def read_runs(
        self,
        firsts: npt.NDArray[np.int64],
        count: int,
        out: npt.NDArray[Any],
        places: npt.NDArray[np.int64] | None = None,
        *,
        pixels: bool = False,
    ) -> None:
        """Copy runs of `count` frames into `out[places]`, file by file.

        Args:
            firsts: the first frame of each run, counted over all files, `[N]`.
            count: frames in a run; none reaches over the end of a file.
            out: uint16 `[M, count, rows, cols]`, or uint8 `[M, count, H, W, 3]` for pixels.
            places: where in `out` each run goes, `[N]`; None puts them one after another.
            pixels: copy the frames' pixels, not their codes.
        """
        files = np.searchsorted(self._firsts, firsts, side="right") - 1
        inside = (files >= 0) & (files < len(self._firsts) - 1)
        if not inside.all() or (firsts + count > self._firsts[files + 1]).any():
            bad = firsts[~inside] if not inside.all() else firsts[firsts + count > self._firsts[files + 1]]
            raise StoreError(f"frames {bad[0]} to {bad[0] + count - 1} are not in one file of it", where=self.folder)
        order = np.argsort(files, kind="stable") if (files != files[0]).any() else np.arange(len(files))
        edges = np.flatnonzero(np.diff(files[order], prepend=-1, append=-1)).tolist()
        for begin, end in itertools.pairwise(edges):
            group = order[begin:end]
            number = int(files[group[0]])
            kept = self._pixels_of(number) if pixels else self._codes_of(number)
            starts = firsts[group] - self._firsts[number]
            if places is None and len(edges) == 2:
                frames = (starts[:, None] + np.arange(count)).ravel()
                flat = kept.reshape(len(kept), -1)  # "clip" copies straight into `out`; the frames lie inside
                np.take(flat, frames, axis=0, out=out.reshape(len(frames), -1), mode="clip")
            elif out[0].nbytes >= LARGE_RUN or end - begin < FEW_RUNS:
                into = group if places is None else places[group]
                for place, start in zip(into.tolist(), starts.tolist(), strict=True):
                    out[place] = kept[start : start + count]
            else:
                out[group if places is None else places[group]] = kept[starts[:, None] + np.arange(count)]

    @property
    def has_pixels(self) -> bool:
        """Whether the pixels of the frames are kept beside their codes."""
        return all("pixels" in shard for shard in self.manifest["shards"])

    def pixels(self, number: int, start: int = 0, count: int | None = None) -> UInt8[Tensor, "T H W 3"]:
        """Pixels of an item's frames `start .. start + count - 1`, as they were tokenized.

        Raises:
            ConfigError: the store was made without them.
        """
        return torch.from_numpy(self.pixel_frames(*self._frames_of(number, start, count)).copy())

    def require_codes(self) -> None:
        """Refuse a store whose codes are made when they are read."""
        if self.is_online:
            fix = "make it again without --online"
            raise StoreError("holds no codes, which training makes as it reads", where=self.folder, fix=fix)

    def require_pixels(self) -> None:
        """Refuse a store that was made without pixels."""
        if not self.has_pixels:
            raise ConfigError(
                "holds codes without pixels", where=self.folder, fix="make it again with `toto tokenize --keep-pixels`"
            )

    @cached_property
    def checksums(self) -> dict[str, str]:
        """The SHA-256 that the manifest names for every file."""
        shards = self.manifest["shards"]
        files = [*shards, *(shard["pixels"] for shard in shards if "pixels" in shard)]
        tables: dict[str, str] = self.manifest["tables"]
        return {file["file"]: file["sha256"] for file in files} | tables

    def require_whole(self, name: str) -> None:
        """Read every byte of a file and compare it with the manifest's checksum.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self.folder / name
        there = path.is_file()
        if not there or sha256_at(path) != self.checksums[name]:
            state = "damaged" if there else "missing"
            raise StoreError(f"{state} (checksum of the manifest)", where=path, fix="make the store again")

    def file(self, name: str) -> Path:
        """A file of the store on this machine, one that the manifest names.

        Of a store at a URL it is a copy that stays until others need the room; open it at once.
        """
        if isinstance(self.folder, Path):
            return self.folder / name
        assert self._kept is not None
        kept, maps = self._kept, weakref.ref(self)

        def let_go() -> None:
            if store := maps():
                store._maps.pop(name, None)

        path = kept.file(name, let_go)
        if self._verify == "read" and name not in self._checked:
            path = kept.checked_again(name, let_go)
            self._checked.add(name)
        return path

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that the manifest names and that is there."""
        if isinstance(self.folder, Path):
            paths = {name: self.folder / name for name in self.checksums}
            return {name: path.stat().st_size for name, path in paths.items() if path.exists()}
        there = {file.name: file.size or 0 for file in self.folder.files()}
        return {name: there[name] for name in self.checksums if name in there}

    def verify(self) -> None:
        """Read every byte and compare it with the manifest's checksums."""
        for name in self.checksums:
            self.require_whole(name)

    def _frames_of(self, number: int, start: int, count: int | None) -> tuple[int, int]:
        """An item's frames as first frame of the store and count."""
        first, total = int(self.column("first_frame")[number]), int(self.column("frame_count")[number])
        return first + start, total - start if count is None else count

    def _place(self, first: int, count: int) -> tuple[int, int]:
        """The number of the shard that frames `first .. first + count - 1` lie in, and where in it they begin."""
        self.require_codes()
        number = int(np.searchsorted(self._firsts, first, side="right")) - 1
        if first < 0 or number >= len(self._firsts) - 1 or first + count > self._firsts[number + 1]:
            last = first + count - 1
            raise StoreError(f"frames {first} to {last} are not in one file of it", where=self.folder)
        return number, first - int(self._firsts[number])

    def _codes_of(self, number: int) -> Codes:
        """The mapped codes of a shard."""
        shard = self.manifest["shards"][number]
        return self._map(shard["file"], np.uint16, (shard["frames"], *self.grid))

    def _pixels_of(self, number: int) -> Pixels:
        """The mapped pixels of a shard."""
        assert self.passport.frame_size is not None
        shard = self.manifest["shards"][number]
        return self._map(shard["pixels"]["file"], np.uint8, (shard["frames"], *self.passport.frame_size, 3))

    def _map(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if name not in self._maps:
            path = self._checked_file(name)
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise StoreError(f"can't be read ({error})", where=path, fix="make the store again") from None
            if mapped.shape != shape or mapped.dtype != dtype:
                found, said = f"{mapped.dtype} {mapped.shape}", f"{np.dtype(dtype)} {shape}"
                raise StoreError(f"holds {found}, the manifest says {said}", where=path, fix="make it again")
            self._maps[name] = mapped.view(np.ndarray)  # slices of a memmap cost three times those of an array
            return self._maps[name]
        if self._kept:
            self._kept.touch(name)
        return self._maps[name]

    def _checked_file(self, name: str) -> Path:
        if self._verify == "read" and isinstance(self.folder, Path) and name not in self._checked:
            self.require_whole(name)
            self._checked.add(name)
        return self.file(name)

    def _read_items(self, columns: list[str]) -> pa.Table:
        path = self._checked_file(ITEMS)
        try:
            with pq.ParquetFile(path) as file:  # read_table would load Arrow's datasets, 12 MB, and threads for them
                found = file.read(columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"items can't be read ({error})", where=path, fix="make the store again") from None
        if found.schema != pa.schema([ITEM_SCHEMA.field(name) for name in columns]):
            raise StoreError("items can't be read (other columns)", where=path, fix="make the store again")
        return found


def _readable(path: Path | RemotePath) -> Path | io.BytesIO:
    return path if isinstance(path, Path) else io.BytesIO(path.read_bytes())


def write_ledger(folder: Path, ledger: list[LedgerRow]) -> None:
    """Write the ledger of a store."""
    _write_table(folder / LEDGER, LEDGER_SCHEMA, ledger)


def read_ledger(folder: Path | RemotePath) -> list[LedgerRow]:
    """The ledger of a store."""
    return [LedgerRow(**row) for row in pq.read_table(_readable(folder / LEDGER)).to_pylist()]


def _write_table(path: Path, schema: pa.Schema, rows: list[Any]) -> None:
    table = pa.Table.from_pylist([vars(row) for row in rows], schema=schema)
    with written_aside(path) as aside:
        pq.write_table(table, aside)
