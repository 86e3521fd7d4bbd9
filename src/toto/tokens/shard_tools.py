"""Whole stores in, whole stores out: describe, check, merge, split.

What is written appears at once and whole, or not at all; a store that is read is never changed. No code is decoded or
encoded: tokens, passport and pixels are carried along as they are.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from toto.media.ledger import LedgerRow, count_by_status
from toto.runtime.errors import ConfigError, InterruptedRunError, StoreError
from toto.runtime.files import folder_written_aside, remove_leftovers
from toto.runtime.interrupt import StopRequest, stop_on_signal
from toto.runtime.places import sha256_at
from toto.runtime.progress import Progress
from toto.runtime.provenance import ANOTHER, write_provenance
from toto.runtime.remote import RemotePath
from toto.runtime.seed import stream
from toto.tokens.shards import (
    MANIFEST,
    StoredItem,
    TokenStore,
    finish_store,
    pixels_name,
    read_ledger,
    read_splits,
    shard_name,
    write_ledger,
    write_pixels,
    write_shard,
    write_splits,
)

Chosen = npt.NDArray[np.bool_]


def describe(store: TokenStore) -> dict[str, Any]:
    """What a store holds, as plain values."""
    rows, cols = store.grid
    tokens = store.frame_count * rows * cols
    shards = store.manifest["shards"]
    sizes = store.sizes()
    pixels = sum(sizes.get(shard["pixels"]["file"], 0) for shard in shards if "pixels" in shard)
    counts = store.column("frame_count")
    return {
        "folder": str(store.folder),
        "passport": store.passport.to_dict(),
        "stride": store.stride,
        "items": len(store),
        "kinds": {kind: int(store.is_kind(kind).sum()) for kind in ("video", "image")},
        "frames": store.frame_count,
        "tokens": tokens,
        "frames_in_an_item": {
            "least": int(counts.min()),
            "median": float(np.median(counts)),
            "most": int(counts.max()),
        },
        "files": len(shards),
        "bytes": sum(sizes.values()),
        "bytes_a_token": (sum(sizes.values()) - pixels) / tokens,
        "pixel_bytes": pixels,
        "classes": _classes(store),
        "ledger": store.manifest["ledger"],
    }


def damaged_files(store: TokenStore) -> list[str]:
    """Read every byte of a store; the names of the files that are missing or differ from their checksums."""
    found = []
    with stop_on_signal() as stop, Progress("verifying", total=len(store.checksums), unit="files") as progress:
        for name in store.checksums:
            try:
                store.require_whole(name)
            except StoreError as error:
                found.append(f"{name} {error.what.split()[0]}")
            progress.advance(note=f"{len(found)} damaged" if found else "")
            _leave_if(stop, store.folder)
    return found


def find_item(store: TokenStore, name: str) -> int:
    """The place of the item with this id, or of the item with this number.

    Raises:
        ConfigError: there is none.
    """
    ids = store.table.column("id")
    place = int(pc.index(ids, pa.scalar(name)).as_py())
    if place < 0 and name.isdecimal() and int(name) < len(store):
        place = int(name)
    if place < 0:
        raise ConfigError(
            f"holds no item {name!r}", where=store.folder, fix=f"name an id such as {ids[0]}, or 0 to {len(store) - 1}"
        )
    return place


def merge(
    stores: list[TokenStore], out: Path, *, config: Any, prefix: bool = False, copy: bool = False, pixels: bool = True
) -> TokenStore:
    """Join stores of the same passport and stride into a new one, in their order.

    Args:
        stores: at least one.
        out: the new store; must not be there, or be empty.
        config: what is written into the new store's record.
        prefix: put the name of its store before each id. Without it, an id that occurs twice is refused.
        copy: copy files. Without it they are linked where the file system can, and take no space.
        pixels: carry the frames' pixels along; all stores must hold them, or none.

    Raises:
        ConfigError: too few stores, one is given twice, an id occurs twice, or only some hold pixels.
        PassportError: other tokens.
    """
    _require_alike(stores, pixels)
    names = _names(stores) if prefix else [""] * len(stores)
    items, ledger = [], []
    splits: dict[str, str | None] = {}
    first = 0
    for store, name in zip(stores, names, strict=True):
        rows = [replace(item, id=name + item.id, first_frame=first + item.first_frame) for item in items_of(store)]
        items += rows
        ledger += [replace(row, id=name + row.id) for row in read_ledger(store.folder)]
        splits |= {name + item: split for item, split in read_splits(store.folder).items()}
        first += store.frame_count
    _require_single(items, stores)
    shards: list[dict[str, Any]] = []
    total = sum(len(store.manifest["shards"]) for store in stores)
    with (
        stop_on_signal() as stop,
        new_output(out) as aside,
        Progress("merging", total=total, unit="files") as progress,
    ):
        for store in stores:
            for shard in store.manifest["shards"]:
                entry = {**shard, "file": shard_name(len(shards))}
                _carry(store.file(shard["file"]), aside / entry["file"], copy)
                kept = entry.pop("pixels", None)
                if kept and pixels:
                    entry["pixels"] = {**kept, "file": pixels_name(len(shards))}
                    _carry(store.file(kept["file"]), aside / entry["pixels"]["file"], copy)
                shards.append(entry)
                progress.advance()
                _leave_if(stop, out)
        job = {"merged": [sha256_at(store.folder / MANIFEST) for store in stores]}
        classes = _joined([store.manifest["classes"] for store in stores])
        _finish(aside, stores[0], shards, items, ledger, job, config, splits, classes)
    return TokenStore(out)


def split(store: TokenStore, chosen: Chosen, out: Path, rest: Path, *, config: Any) -> tuple[TokenStore, TokenStore]:
    """Cut a store into two: the chosen items, and the others.

    Each ledger has the rows of its own items; rows of inputs that became no item stay with the others.

    Args:
        store: the whole.
        chosen: which items go to `out`.
        out: a new store.
        rest: a new store.
        config: what is written into the new stores' records.

    Raises:
        ConfigError: one of the two would be empty.
    """
    if chosen.all() or not chosen.any():
        where = rest if chosen.all() else out
        raise ConfigError("would be left without an item", where=where, fix="choose other items, or another share")
    if out.resolve() == rest.resolve():
        raise ConfigError("is named for both parts", where=out, fix="give --out and --rest two folders")
    items, ledger = items_of(store), read_ledger(store.folder)
    taken = {whole_id(item.id) for item, mine in zip(items, chosen, strict=True) if mine}
    left = {whole_id(item.id) for item, mine in zip(items, chosen, strict=True) if not mine}
    whole = sha256_at(store.folder / MANIFEST)
    with stop_on_signal() as stop, new_output(out) as first, new_output(rest) as second:
        parts = (
            (first, chosen, [row for row in ledger if row.id in taken], "chosen"),
            (second, ~chosen, [row for row in ledger if row.id not in taken or row.id in left], "rest"),
        )
        with Progress("splitting", total=2 * len(store.manifest["shards"]), unit="files") as progress:
            for aside, mine, rows, name in parts:
                shards, kept = _cut(store, [item for item, one in zip(items, mine, strict=True) if one], aside,
                                    progress, stop)  # fmt: skip
                _finish(aside, store, shards, kept, rows, {"split": whole, "part": name}, config,
                        read_splits(store.folder), store.manifest["classes"])  # fmt: skip
    return TokenStore(out), TokenStore(rest)


def chosen_by_share(store: TokenStore, share: float, seed: int) -> Chosen:
    """A share of the items at random; views of one source item stay together."""
    ids = [whole_id(item.id) for item in items_of(store)]
    sources = sorted(set(ids))
    count = round(share * len(sources))
    taken = {sources[place] for place in stream(seed, "split").permutation(len(sources))[:count]}
    return np.array([name in taken for name in ids])


def chosen_by_label(store: TokenStore, labels: Collection[str]) -> Chosen:
    """The items of some labels.

    Raises:
        ConfigError: a label that no item has.
    """
    held = [item.label for item in items_of(store)]
    _require_known(store, labels, {label for label in held if label is not None}, "label")
    return np.array([label in set(labels) for label in held])


def chosen_by_id(store: TokenStore, ids: Collection[str]) -> Chosen:
    """The items with some ids, and all views of their source items.

    Raises:
        ConfigError: an id that no item has.
    """
    held = [item.id for item in items_of(store)]
    _require_known(store, ids, {*held, *map(whole_id, held)}, "item")
    wanted = {whole_id(name) for name in ids}
    return np.array([whole_id(name) in wanted for name in held])


def items_of(store: TokenStore) -> list[StoredItem]:
    """All items of a store."""
    return [StoredItem(**row) for row in store.table.to_pylist()]


def whole_id(name: str) -> str:
    """The source item's id of a view's.

    >>> whole_id("a/b.mp4#1")
    'a/b.mp4'
    """
    return re.sub(r"#\d+$", "", name)


@contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all goes well.

    Raises:
        ConfigError: `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("is not empty", where=out, fix=ANOTHER)
    if out.parent.is_dir():
        remove_leftovers(out.parent)
    with folder_written_aside(out) as aside:
        yield aside


def _leave_if(stop: StopRequest, where: object) -> None:
    if stop:
        raise InterruptedRunError(f"stopped by {stop.name}", where=where, fix="nothing was written; run it again")


def _require_alike(stores: list[TokenStore], pixels: bool) -> None:
    if not stores:
        raise ConfigError("no store to merge", where="toto shards merge", fix="name the stores")
    for store in stores:
        store.require_codes()
    first, places = stores[0], [_resolved(store.folder) for store in stores]
    for number, store in enumerate(stores[1:], start=1):
        if places[number] in places[:number]:
            raise ConfigError("is given twice", where=store.folder, fix="name each store once")
        first.passport.require_same(store.passport, where=str(store.folder), fix="merge stores of the same tokens")
        if store.stride != first.stride:
            raise ConfigError(
                f"has stride {store.stride}, {first.folder} has {first.stride}", where=store.folder, fix="merge alike"
            )
        if pixels and store.has_pixels != first.has_pixels:
            without = first if store.has_pixels else store
            raise ConfigError("holds no pixels, another store does", where=without.folder, fix="add --no-pixels")


def _require_single(items: list[StoredItem], stores: list[TokenStore]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            folders = ", ".join(str(store.folder) for store in stores)
            raise ConfigError(f"item {item.id} occurs twice", where=folders, fix="add --prefix")
        seen.add(item.id)


def _require_known(store: TokenStore, wanted: Collection[str], held: Collection[str], what: str) -> None:
    if not wanted:
        raise ConfigError(f"names no {what}", where=f"--{what}s", fix="name at least one")
    if strange := [name for name in wanted if name not in held]:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        example = f"such as {min(held)}" if held else "by --share; it has none"
        raise ConfigError(f"holds no {what} {strange[0]!r}{more}", where=store.folder, fix=f"choose {example}")


def _resolved(folder: Path | RemotePath) -> Path | RemotePath:
    return folder.resolve() if isinstance(folder, Path) else folder


def _names(stores: list[TokenStore]) -> list[str]:
    """What stands before the ids of each store: its folder's name, numbered where several have the same."""
    names = [_resolved(store.folder).name for store in stores]
    return [
        f"{name}{f'-{names[:place].count(name) + 1}' if names.count(name) > 1 else ''}/"
        for place, name in enumerate(names)
    ]


def _joined(orders: list[list[str]]) -> list[str]:
    """Class names of several stores: in the order they come, or by the alphabet where each has them so."""
    names = list(dict.fromkeys(name for order in orders for name in order))
    return sorted(names) if all(order == sorted(order) for order in orders) else names


def _carry(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk, or a file system without links
            pass
        else:
            return
    shutil.copyfile(source, target)


def _cut(
    store: TokenStore, items: list[StoredItem], aside: Path, progress: Progress, stop: StopRequest
) -> tuple[list[dict[str, Any]], list[StoredItem]]:
    """Write the frames of some items, file by file; their entries and the items as they lie now."""
    shards: list[dict[str, Any]] = []
    moved: list[StoredItem] = []
    waiting = sorted(items, key=lambda item: item.first_frame)
    first = end = place = 0
    for shard in store.manifest["shards"]:
        end += shard["frames"]
        begin = place
        while place < len(waiting) and waiting[place].first_frame < end:
            moved.append(replace(waiting[place], first_frame=first))
            first += waiting[place].frame_count
            place += 1
        if mine := waiting[begin:place]:
            codes = [store.frames(item.first_frame, item.frame_count) for item in mine]
            entry = write_shard(aside, len(shards), codes, store.grid)
            if store.has_pixels:
                clips = (store.pixel_frames(item.first_frame, item.frame_count) for item in mine)
                assert store.passport.frame_size is not None
                shape = (entry["frames"], *store.passport.frame_size)
                entry["pixels"] = write_pixels(aside, len(shards), clips, shape)
            shards.append(entry)
        progress.advance()
        _leave_if(stop, aside)
    return shards, moved


def _finish(
    aside: Path,
    like: TokenStore,
    shards: list[dict[str, Any]],
    items: list[StoredItem],
    ledger: Iterable[LedgerRow],
    job: dict[str, Any],
    config: Any,
    splits: Mapping[str, str | None],
    classes: Sequence[str],
) -> None:
    rows = sorted(ledger, key=lambda row: row.id)
    write_ledger(aside, rows)
    write_provenance(aside, config)
    write_splits(aside, {item.id: splits.get(item.id) for item in items})
    finish_store(
        aside,
        passport=like.passport,
        stride=like.stride,
        shards=shards,
        items=items,
        counts=count_by_status(rows),
        job=job,
        classes=classes,
    )


def _classes(store: TokenStore) -> dict[str, int]:
    """How many items each label has."""
    counts = Counter(store.table.column("label").to_pylist())
    return {str(label): counts[label] for label in sorted(label for label in counts if label is not None)}
