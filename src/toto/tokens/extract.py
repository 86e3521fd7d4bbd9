"""From a folder of images and videos to a store of shards: many processes, resumable at any moment.

The catalog is cut into shards before anything is read, so the cut depends on the files alone. Items are encoded by
worker processes of one thread each and collected in order; a shard is written aside and renamed, then its part of
the tables is. Thus two runs give the same bytes, whatever the number of workers and however often one was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tyro.conf import Positional

from toto.media.catalog import Catalog, Item, find_duplicates, list_source
from toto.media.decode import read_image, stream_video
from toto.media.ledger import LedgerRow, Status, count_by_status
from toto.media.transforms import apply_crop, crop_box, resize, shortest_side_to
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError, InterruptedRunError, MediaError, ShortMediaError, TotoError
from toto.runtime.files import read_json, remove_leftovers, write_json
from toto.runtime.interrupt import StopRequest, leave_with_parent, stop_on_signal
from toto.runtime.progress import Progress
from toto.runtime.provenance import as_plain, write_provenance
from toto.runtime.seed import stream
from toto.tokens.passport import Passport
from toto.tokens.shards import (
    LEDGER,
    MANIFEST,
    Codes,
    StoredItem,
    TokenStore,
    finish_store,
    write_ledger,
    write_pixels,
    write_shard,
)
from toto.tokens.tokenizer import EMBEDDED, Arithmetic, Tokenizer, load_tokenizer

PLAN = "plan.json"
MOST_CODES = 2**16  # two bytes a token
PARTS = "parts"
IMAGES_IN_SHARD = 16_384
BYTES_IN_SHARD = 64_000_000


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Tokenize a folder of images and videos (or one file) into a store of shards.

    Run the same job again to continue one that was interrupted.

    Attributes:
        source: a folder of images and videos, or one file; the first folder below it is the label.
        out: the store's folder.
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
        device: where the tokenizer runs: auto, cpu, cuda, ...
        precision: of the tokenizer's matrix products, fp32 or bf16. In bf16 it is faster, and a few codes in a hundred
            are other ones.
    """

    source: Positional[Path]
    out: Path
    tokenizer: str = EMBEDDED
    size: int = 128
    stride: int = 4
    min_frames: int = 16
    views: int = 1
    seed: int = 0
    keep_pixels: bool = False
    workers: int | None = None
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
    catalog = list_source(config.source)
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
    with stop_on_signal() as stop, Progress("tokenizing", total=offered, unit="items", done=done) as progress:
        todo = (item for shard in pending for item in shard)
        encoded = _encode_all(config, tokenizer, todo, duplicates)
        for number, shard in enumerate(pending, start=len(parts)):
            results = [_next(encoded, stop, progress, config.out) for _ in shard]
            parts.append(_write_part(config, number, results, tokenizer.grid(config.size, config.size)))
    _assemble(config, passport, catalog, parts)
    return TokenStore(config.out)


def cut(catalog: Catalog) -> list[tuple[Item, ...]]:
    """Cut the items into shards of bounded size, from the files' kinds and sizes alone."""
    shards: list[list[Item]] = [[]]
    filled = 0.0
    for item in catalog.items:
        size = item.path.stat().st_size if item.path.is_file() else 0
        share = 1 / IMAGES_IN_SHARD if item.kind == "image" else size / BYTES_IN_SHARD
        if shards[-1] and filled + share > 1:
            shards.append([])
            filled = 0.0
        shards[-1].append(item)
        filled += share
    return [tuple(shard) for shard in shards]


def encode_item(item: Item, tokenizer: Tokenizer, config: TokenizeConfig) -> Encoded:
    """Decode and encode every view of an item; what is wrong with it is returned, not raised."""
    try:
        views = tuple(_encode_view(item, number, tokenizer, config) for number in range(config.views))
    except MediaError as error:
        for number in range(config.views if config.keep_pixels else 0):
            _waiting_pixels(config, item, number).unlink(missing_ok=True)
        return Encoded(item=item, status=error.status, reason=error.what)
    return Encoded(item=item, views=views)


def _encode_view(item: Item, number: int, tokenizer: Tokenizer, config: TokenizeConfig) -> View:
    rng = stream(config.seed, "view", item.id, number)
    offset = int(rng.integers(config.stride)) if number else 0
    clips = (
        stream_video(item.path, stride=config.stride, offset=offset, source=item.id)
        if item.kind == "video"
        else iter([read_image(item.path, source=item.id)])
    )
    box, codes, rate = None, [], 0.0
    pixels = _waiting_pixels(config, item, number) if config.keep_pixels else None
    with pixels.open("wb") if pixels else contextlib.nullcontext() as kept:
        for clip in clips:
            height, width = shortest_side_to(clip.frames.shape[1], clip.frames.shape[2], config.size)
            box = box or crop_box(height, width, config.size, "random" if number else "centre", rng)
            frames = apply_crop(resize(clip.frames, height, width), box)
            codes.append(tokenizer.encode(frames.to(tokenizer.device)).cpu().numpy().astype(np.uint16))
            if kept:
                kept.write(frames.contiguous().numpy().data)
            rate = clip.rate
    whole = np.concatenate(codes)
    if item.kind == "video" and len(whole) < config.min_frames:
        raise ShortMediaError(
            f"{len(whole)} frames at stride {config.stride}, fewer than {config.min_frames}", where=item.id
        )
    return View(codes=whole, fps=rate, pixels=pixels)


def _waiting_pixels(config: TokenizeConfig, item: Item, number: int) -> Path:
    """Where a view's frames wait: a video's may be larger than memory, and would be slow to hand over."""
    name = hashlib.sha256(_view_id(item.id, number).encode()).hexdigest()
    return config.out / PARTS / f"{name[:32]}.pixels"


_worker: tuple[Tokenizer, TokenizeConfig] | None = None


def _start_worker(config: TokenizeConfig) -> None:
    global _worker
    leave_with_parent()
    torch.set_num_threads(1)
    _worker = load_tokenizer(config.tokenizer, device=pick_device(config.device), precision=config.precision), config


def _work(item: Item) -> Encoded:
    assert _worker is not None
    return encode_item(item, *_worker)


def _encode_all(
    config: TokenizeConfig, tokenizer: Tokenizer, items: Iterable[Item], duplicates: dict[str, str]
) -> Iterator[Encoded]:
    """Results of all items in their order; duplicates are not read."""
    workers = (os.cpu_count() or 1) if config.workers is None else config.workers

    def known(item: Item) -> Encoded | None:
        if item.id not in duplicates:
            return None
        return Encoded(item=item, status="duplicate", reason=f"the same bytes as {duplicates[item.id]}")

    if workers == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker, so that the bytes don't depend on the number of workers
        try:
            for item in items:
                yield known(item) or encode_item(item, tokenizer, config)
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(config,)
    ) as pool:
        try:
            yield from _in_order(pool, items, known, window=4 * workers)
        except BrokenProcessPool:
            raise TotoError(
                "a worker process died (out of memory, or a decoder crashed)",
                where=config.source,
                fix="run the same command again to continue, with fewer --workers if memory was short",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, items: Iterable[Item], known: Callable[[Item], Encoded | None], *, window: int
) -> Iterator[Encoded]:
    waiting: deque[Encoded | Future[Encoded]] = deque()
    for item in items:
        waiting.append(known(item) or pool.submit(_work, item))
        while len(waiting) > window:
            first = waiting.popleft()
            yield first if isinstance(first, Encoded) else first.result()
    while waiting:
        first = waiting.popleft()
        yield first if isinstance(first, Encoded) else first.result()


def _next(encoded: Iterator[Encoded], stop: StopRequest, progress: Progress, out: Path) -> Encoded:
    result = next(encoded)
    progress.advance(note="" if result.status == "ok" else f"{result.item.id}: {result.status}")
    if stop:
        raise InterruptedRunError(f"stopped by {stop.name}", where=out, fix="run the same command again to continue")
    return result


def _plan(config: TokenizeConfig, passport: Passport, catalog: Catalog) -> str:
    """Begin or continue the job in its folder; refuse a folder that holds another one."""
    files = [[item.id, item.kind, item.path.stat().st_size if item.path.is_file() else -1] for item in catalog.items]
    digest = hashlib.sha256(json.dumps([files, [row.id for row in catalog.skipped]]).encode()).hexdigest()
    plan = {
        "passport": passport.to_dict(),
        "catalog_sha256": digest,
        "inputs": len(files),
        **_choices(config),
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


def _choices(config: TokenizeConfig) -> dict[str, Any]:
    """The options that decide what the store holds."""
    names = ("size", "stride", "min_frames", "views", "seed")
    chosen = {name: getattr(config, name) for name in names}
    unusual = {"keep_pixels": True} if config.keep_pixels else {}  # stores without them stay as they were
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
    finish_store(
        config.out,
        passport=passport,
        stride=config.stride,
        shards=[part["shard"] for part in parts],
        items=items,
        counts=counts,
        job=read_json(config.out / PLAN, what="tokenizing plan"),
    )
    _tidy(config.out)


def _tidy(out: Path) -> None:
    """Drop what only an unfinished job needs, and what killed processes left."""
    (out / PLAN).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    remove_leftovers(out)
