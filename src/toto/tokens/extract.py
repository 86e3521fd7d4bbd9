"""From images and videos to a store of shards: many processes, resumable at any moment.

The catalog is cut into shards before anything is read, so the cut depends on the files alone. Items are encoded by
worker processes of one thread each and collected in order; a shard is written aside and renamed, then its part of
the tables is. Thus two runs give the same bytes, whatever the number of workers and however often one was killed.

A decoder that crashes or hangs costs its worker and its item (the windows of one video are read together), never the
run. Without workers it can't be kept apart: a crash ends the process, and the time limit is not watched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tyro.conf import Positional

from toto.media.catalog import Catalog, Item, find_duplicates, units
from toto.media.catalogs import open_source
from toto.media.clip import Clip
from toto.media.ledger import LedgerRow, Status, count_by_status
from toto.media.reading import stream_item, stream_unit
from toto.media.transforms import Box, apply_crop, crop_box, resize, shortest_side_to
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError, InterruptedRunError, MediaError, ShortMediaError, TotoError
from toto.runtime.files import read_json, remove_leftovers, write_json
from toto.runtime.interrupt import StopRequest, stop_on_signal
from toto.runtime.progress import Progress
from toto.runtime.provenance import as_plain, write_provenance
from toto.runtime.seed import stream
from toto.runtime.workers import Lost, Workers
from toto.tokens.passport import Passport
from toto.tokens.shards import (
    LEDGER,
    MANIFEST,
    Codes,
    StoredItem,
    TokenStore,
    finish_store,
    read_splits,
    write_ledger,
    write_pixels,
    write_shard,
    write_splits,
)
from toto.tokens.tokenizer import EMBEDDED, Arithmetic, Tokenizer, load_tokenizer

PLAN = "plan.json"
MOST_CODES = 2**16  # two bytes a token
PARTS = "parts"
Unit = tuple[Item, ...]  # what is read in one pass: an item, or the windows of one file
IMAGES_IN_SHARD = 16_384
BYTES_IN_SHARD = 64_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Tokenize images and videos into a store of shards.

    Run the same job again to continue one that was interrupted.

    Attributes:
        source: a folder (the first folder below it is the label), a file, a manifest or a container, recognised by
            its form, or KIND:PATH with KIND one of imagefolder, kinetics, ego4d, howto100m, webdataset, parquet, list
            and jsonl.
        out: the store's folder.
        clips: the folder that holds what a manifest names; by default the manifest's own.
        split: use this split alone (train, val, ...).
        tokenizer: "embedded" or a tokenizer folder.
        size: R; the shortest side becomes R, then an R x R crop is taken.
        stride: every stride-th frame of a video is kept (the paper: 4).
        min_frames: a video with fewer frames than this at the stride is short, and not stored.
        views: how often each item is tokenized. The first view is the centre crop from frame 0; further ones are
            random crops that start at a random frame below the stride.
        seed: seed of the random views.
        keep_pixels: keep the frames beside their codes, for models that take or predict patches. At 128 pixels a frame
            takes 49,152 bytes, its codes 512.
        workers: processes; 0 encodes in this one. None uses every core.
        time_limit: seconds that an item may take before it is given up as corrupt (needs workers).
        device: where the tokenizer runs: auto, cpu, cuda, ...
        precision: of the tokenizer's matrix products, fp32 or bf16. In bf16 it is faster, and a few codes in a hundred
            are other ones.
    """

    source: Positional[Path]
    out: Path
    clips: Path | None = None
    split: str | None = None
    tokenizer: str = EMBEDDED
    size: int = 128
    stride: int = 4
    min_frames: int = 16
    views: int = 1
    seed: int = 0
    keep_pixels: bool = False
    workers: int | None = None
    time_limit: float = 600.0
    device: str = "auto"
    precision: Arithmetic = "fp32"

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("stride", 1), ("min_frames", 1), ("views", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"must be at least {least}, is {getattr(self, name)}", where=f"--{name.replace('_', '-')}"
                )
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"must not be negative, is {self.workers}", where="--workers")
        if not self.time_limit > 0:
            raise ConfigError(f"must be more than 0, is {self.time_limit:g}", where="--time-limit")


@dataclass(frozen=True, kw_only=True)
class View:
    """Codes of one view of an item; `pixels` is the file that its frames wait in until the shard is written."""

    codes: Codes
    fps: float
    pixels: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a worker made of an item: its views, or why there are none."""

    item: Item
    views: tuple[View, ...] = ()
    status: Status = "ok"
    reason: str = ""


def tokenize(config: TokenizeConfig) -> TokenStore:
    """Tokenize a source into a store, or finish a store that an earlier run of the same job began.

    Raises:
        ConfigError: nothing to read, or the folder holds another job.
        InterruptedRunError: a signal arrived; the same call continues.
    """
    tokenizer = load_tokenizer(config.tokenizer, device=pick_device(config.device), precision=config.precision)
    passport = tokenizer.at(config.size, config.size)
    if passport.vocab_size > MOST_CODES:
        raise ConfigError(
            f"has {passport.vocab_size:,} codes, a store holds at most {MOST_CODES:,}",
            where=config.tokenizer,
            fix="use another tokenizer",
        )
    catalog = open_source(str(config.source), clips=config.clips, split=config.split)
    duplicates = find_duplicates(catalog.items)
    shards = cut(catalog)
    if _plan(config, passport, catalog) == "finished":
        _tidy(config.out)
        return TokenStore(config.out)
    (config.out / PARTS).mkdir(exist_ok=True)
    parts = _finished_parts(config.out)
    pending = shards[len(parts) :]
    offered = len(catalog.items)
    done = offered - sum(len(shard) for shard in pending)
    with (
        stop_on_signal() as stop,
        Progress("tokenizing", total=offered, unit="items", done=done) as progress,
        contextlib.closing(_encode_all(config, tokenizer, pending, duplicates)) as encoded,
    ):
        for number, shard in enumerate(pending, start=len(parts)):
            results = [_next(encoded, stop, progress, config.out) for _ in shard]
            parts.append(_write_part(config, number, results, tokenizer.grid(config.size, config.size)))
    _assemble(config, passport, catalog, parts)
    return TokenStore(config.out)


def cut(catalog: Catalog) -> list[tuple[Item, ...]]:
    """Cut the items into shards of bounded size, from their kinds and sizes alone; windows of a file stay together."""
    shards: list[list[Item]] = [[]]
    filled = 0.0
    for unit in units(catalog.items):
        share = 1 / IMAGES_IN_SHARD if unit[0].kind == "image" else unit[0].size / BYTES_IN_SHARD
        if shards[-1] and filled + share > 1:
            shards.append([])
            filled = 0.0
        shards[-1] += unit
        filled += share
    return [tuple(shard) for shard in shards]


def encode_item(item: Item, tokenizer: Tokenizer, config: TokenizeConfig) -> Encoded:
    """Decode and encode every view of an item; what is wrong with it is returned, not raised."""
    try:
        views = tuple(_encode_view(item, number, tokenizer, config) for number in range(config.views))
    except MediaError as error:
        return _failed(item, error, config)
    return Encoded(item=item, views=views)


def encode_windows(unit: Unit, tokenizer: Tokenizer, config: TokenizeConfig) -> tuple[Encoded, ...]:
    """The same for several windows of one video, which is read once for each view."""
    found: list[list[View]] = [[] for _ in unit]
    wrong: dict[int, MediaError] = {}
    for view in range(config.views):
        made = [_ViewMaker(item, view, tokenizer, config) for item in unit]
        with contextlib.ExitStack() as files:
            for maker in made:
                files.callback(maker.close)
            for place, clip in stream_unit(unit, stride=config.stride, offsets=[maker.offset for maker in made]):
                if isinstance(clip, MediaError):
                    wrong.setdefault(place, clip)
                elif place not in wrong:
                    made[place].add(clip)
        for place, maker in enumerate(made):
            try:
                if place not in wrong:
                    found[place].append(maker.finish())
            except MediaError as error:
                wrong[place] = error
    return tuple(
        _failed(item, wrong[place], config) if place in wrong else Encoded(item=item, views=tuple(found[place]))
        for place, item in enumerate(unit)
    )


def _failed(item: Item, error: MediaError, config: TokenizeConfig) -> Encoded:
    for number in range(config.views if config.keep_pixels else 0):
        _waiting_pixels(config, item, number).unlink(missing_ok=True)
    return Encoded(item=item, status=error.status, reason=error.what)


def _encode_view(item: Item, number: int, tokenizer: Tokenizer, config: TokenizeConfig) -> View:
    with contextlib.closing(_ViewMaker(item, number, tokenizer, config)) as maker:
        for clip in stream_item(item, stride=config.stride, offset=maker.offset):
            maker.add(clip)
    return maker.finish()


@dataclass
class _ViewMaker:
    """Takes the clips of one view of an item, and makes its codes (and pixels)."""

    item: Item
    number: int
    tokenizer: Tokenizer
    config: TokenizeConfig
    codes: list[Codes] = field(default_factory=list)
    rate: float = 0.0

    def __post_init__(self) -> None:
        self._rng = stream(self.config.seed, "view", self.item.id, self.number)
        self.offset = int(self._rng.integers(self.config.stride)) if self.number else 0
        self._box: Box | None = None
        self._pixels = _waiting_pixels(self.config, self.item, self.number) if self.config.keep_pixels else None
        self._file = self._pixels.open("wb") if self._pixels else None

    def add(self, clip: Clip) -> None:
        """The next frames."""
        size = self.config.size
        height, width = shortest_side_to(clip.frames.shape[1], clip.frames.shape[2], size)
        self._box = self._box or crop_box(height, width, size, "random" if self.number else "centre", self._rng)
        frames = apply_crop(resize(clip.frames, height, width), self._box)
        encoded = self.tokenizer.encode(frames.to(self.tokenizer.device))
        self.codes.append(encoded.cpu().numpy().astype(np.uint16))
        if self._file:
            self._file.write(frames.contiguous().numpy().data)
        self.rate = clip.rate

    def close(self) -> None:
        """Every frame has been given, or none will be any more."""
        if self._file:
            self._file.close()

    def finish(self) -> View:
        """The view, after `close`."""
        whole = np.concatenate(self.codes)
        if self.item.kind == "video" and len(whole) < self.config.min_frames:
            reason = f"{len(whole)} frames at stride {self.config.stride}, fewer than {self.config.min_frames}"
            raise ShortMediaError(reason, where=self.item.id)
        return View(codes=whole, fps=self.rate, pixels=self._pixels)


def _waiting_pixels(config: TokenizeConfig, item: Item, number: int) -> Path:
    """Where a view's frames wait: a video's may be larger than memory, and would be slow to hand over."""
    name = hashlib.sha256(_view_id(item.id, number).encode()).hexdigest()
    return config.out / PARTS / f"{name[:32]}.pixels"


_worker: tuple[Tokenizer, TokenizeConfig] | None = None


def _start_worker(config: TokenizeConfig) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = load_tokenizer(config.tokenizer, device=pick_device(config.device), precision=config.precision), config


def _work(unit: Unit) -> tuple[Encoded, ...]:
    assert _worker is not None
    return _encode_unit(unit, *_worker)


def _encode_unit(unit: Unit, tokenizer: Tokenizer, config: TokenizeConfig) -> tuple[Encoded, ...]:
    return (encode_item(unit[0], tokenizer, config),) if len(unit) == 1 else encode_windows(unit, tokenizer, config)


def _encode_all(
    config: TokenizeConfig, tokenizer: Tokenizer, shards: Iterable[tuple[Item, ...]], duplicates: dict[str, str]
) -> Generator[Encoded, None, None]:
    """Results of all items in their order; duplicates are not read."""
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers
    todo = (unit for shard in shards for unit in units(shard))

    def known(unit: Unit) -> tuple[Encoded, ...] | None:
        item = unit[0]
        if item.id not in duplicates:
            return None
        return (Encoded(item=item, status="duplicate", reason=f"the same bytes as {duplicates[item.id]}"),)

    if workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker, so that the bytes don't depend on the number of workers
        try:
            for unit in todo:
                yield from known(unit) or _encode_unit(unit, tokenizer, config)
        finally:
            torch.set_num_threads(threads)
        return
    with Workers(_start_worker, _work, (config,), count=workers, what="the decoder") as pool:
        for unit, found in pool.in_order(todo, limit=lambda unit: config.time_limit * len(unit), known=known):
            if isinstance(found, Lost):
                yield from (_failed(item, MediaError(found.reason, where=item.id), config) for item in unit)
            else:
                yield from found


def _next(encoded: Iterator[Encoded], stop: StopRequest, progress: Progress, out: Path) -> Encoded:
    try:
        result = next(encoded)
    except TotoError:  # a signal to the whole group of processes reaches the workers too
        if not stop:
            raise
        raise _interrupted(stop, out) from None
    progress.advance(note="" if result.status == "ok" else f"{result.item.id}: {result.status}")
    if stop:
        raise _interrupted(stop, out)
    return result


def _interrupted(stop: StopRequest, out: Path) -> InterruptedRunError:
    return InterruptedRunError(f"stopped by {stop.name}", where=out, fix="run the same command again to continue")


def _plan(config: TokenizeConfig, passport: Passport, catalog: Catalog) -> str:
    """Begin or continue the job in its folder; refuse a folder that holds another one."""
    plan = {
        "passport": passport.to_dict(),
        "catalog_sha256": _digest(catalog),
        "inputs": len(catalog.items),
        **_choices(config, catalog),
    }
    finished = (config.out / MANIFEST).exists()
    if finished:
        before = read_json(config.out / MANIFEST, what="shard manifest").get("job")
    elif (config.out / PLAN).exists():
        before = read_json(config.out / PLAN, what="tokenizing plan")
    elif config.out.exists() and any(config.out.iterdir()):
        raise ConfigError("is not empty and holds no tokenizing job", where=config.out, fix="choose another --out")
    else:
        write_provenance(config.out, config)
        write_json(config.out / PLAN, plan)
        before = plan
    if before != plan:
        known = before if isinstance(before, dict) else {}
        different = ", ".join(name for name in {**plan, **known} if known.get(name) != plan.get(name))
        raise ConfigError(f"holds another job (different: {different})", where=config.out, fix="choose another --out")
    return "finished" if finished else "open"


def _digest(catalog: Catalog) -> str:
    """The SHA-256 of what the catalog offers: names, sizes, and what a manifest or a container says of them."""
    if catalog.classes is None:
        files: list[Any] = [[item.id, item.kind, _size_or_missing(item)] for item in catalog.items]
        said: list[Any] = [files, [row.id for row in catalog.skipped]]
    else:
        files = [[item.id, item.kind, item.size, item.label, item.split, as_plain(item.part)] for item in catalog.items]
        said = [files, [[row.id, row.reason] for row in catalog.skipped], catalog.classes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _size_or_missing(item: Item) -> int:
    return item.path.stat().st_size if item.path.is_file() else -1


def _choices(config: TokenizeConfig, catalog: Catalog) -> dict[str, Any]:
    """The options that decide what the store holds."""
    names = ("size", "stride", "min_frames", "views", "seed")
    chosen = {name: getattr(config, name) for name in names}
    unusual: dict[str, Any] = {"keep_pixels": True} if config.keep_pixels else {}  # other stores stay as they were
    if catalog.form != "imagefolder":
        unusual["form"] = catalog.form
    if config.split is not None:
        unusual["split"] = config.split
    return chosen | unusual | ({"precision": config.precision} if config.precision != "fp32" else {})


def _finished_parts(out: Path) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    while (path := out / PARTS / f"{len(parts):05d}.json").exists():
        parts.append(read_json(path, what="part of a store"))
    return parts


def _write_part(config: TokenizeConfig, number: int, results: list[Encoded], grid: tuple[int, int]) -> dict[str, Any]:
    views = [view for result in results for view in result.views]
    shard = write_shard(config.out, number, [view.codes for view in views], grid)
    if config.keep_pixels:
        waiting = [(view.pixels, len(view.codes)) for view in views if view.pixels]
        clips = (np.memmap(path, np.uint8, "r", shape=(T, config.size, config.size, 3)) for path, T in waiting)
        shard["pixels"] = write_pixels(config.out, number, clips, (shard["frames"], config.size, config.size))
        for path, _ in waiting:
            path.unlink()
    items = [
        {"id": _view_id(result.item.id, place), "kind": result.item.kind, "label": result.item.label}
        | {"frame_count": len(view.codes), "fps": view.fps, "stride": config.stride}
        for result in results
        for place, view in enumerate(result.views)
    ]
    ledger = [
        LedgerRow(
            id=result.item.id,
            kind=result.item.kind,
            status=result.status,
            reason=result.reason,
            frames=sum(len(view.codes) for view in result.views),
        )
        for result in results
    ]
    part = {"shard": shard, "items": items, "ledger": as_plain(ledger)}
    write_json(config.out / PARTS / f"{number:05d}.json", part)
    return part


def _view_id(item: str, view: int) -> str:
    return f"{item}#{view}" if view else item


def _assemble(config: TokenizeConfig, passport: Passport, catalog: Catalog, parts: list[dict[str, Any]]) -> None:
    """Join the parts' tables, write the manifest, and drop what only an unfinished job needs."""
    rows = [LedgerRow(**row) for part in parts for row in part["ledger"]]
    ledger = sorted(rows + list(catalog.skipped), key=lambda row: row.id)
    counts = count_by_status(ledger)
    write_ledger(config.out, ledger)
    if not counts.get("ok"):
        reason = rows[0].reason
        raise MediaError(
            f"nothing could be used (the first: {reason})",
            where=config.source,
            fix=f"see {config.out / LEDGER}",
        )
    items, first = [], 0
    for row in (row for part in parts for row in part["items"]):
        items.append(StoredItem(first_frame=first, **row))
        first += row["frame_count"]
    split_of = {item.id: item.split for item in catalog.items}
    splits = {item.id: split_of.get(item.id, split_of.get(item.id.rpartition("#")[0])) for item in items}
    write_splits(config.out, splits)
    finish_store(
        config.out,
        passport=passport,
        stride=config.stride,
        shards=[part["shard"] for part in parts],
        items=items,
        counts=counts,
        job=read_json(config.out / PLAN, what="tokenizing plan"),
        classes=catalog.classes,
    )
    _tidy(config.out)


def count_splits(out: Path) -> dict[str, int]:
    """How many items of a store are of each split; empty where its source named none."""
    return dict(sorted(Counter(name or "none" for name in read_splits(out).values()).items()))


def _tidy(out: Path) -> None:
    """Drop what only an unfinished job needs, and what killed processes left."""
    (out / PLAN).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    remove_leftovers(out)
