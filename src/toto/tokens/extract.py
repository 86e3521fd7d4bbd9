"""From images and videos to a store of shards: many processes, resumable at any moment.

The catalog is cut into shards before anything is read, so the cut depends on the files alone. Items are encoded by
worker processes of one thread each and collected in order; a shard is written aside and renamed, then its part of
the tables is. Thus two runs give the same bytes, whatever the number of workers and however often one was killed.

A decoder that crashes or hangs costs its worker and its item (the windows of one video are read together), never the
run. Without workers it can't be kept apart: a crash ends the process, and the time limit is not watched.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from toto.media.catalog import Catalog, Item, find_duplicates, units
from toto.media.catalogs import open_source
from toto.media.ledger import LedgerRow, Status, count_by_status
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError, InterruptedRunError, MediaError, TotoError
from toto.runtime.files import read_json, write_json
from toto.runtime.interrupt import StopRequest, stop_on_signal
from toto.runtime.places import AnyPath
from toto.runtime.progress import Progress
from toto.runtime.provenance import RECORD, as_plain, write_provenance
from toto.runtime.workers import worker_count
from toto.tokens.encoding import Encoded, Framing, view_id
from toto.tokens.origin import CHOSEN, Origin, digest
from toto.tokens.output import PLAN, Output
from toto.tokens.parallel import TASKS_A_WORKER, Work, encode_all, tasks
from toto.tokens.passport import Passport
from toto.tokens.shards import (
    ITEMS,
    LEDGER,
    MANIFEST,
    ONLINE,
    SPLITS,
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

MOST_CODES = 2**16  # two bytes a token
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
        out: the store's folder, or a URL.
        clips: the folder that holds what a manifest names; by default the manifest's own.
        split: use this split alone (train, val, ...).
        image_column: of parquet files, the column with the bytes of images or videos; by default one with a usual name.
        label_column: of parquet files and CSVs, the column with the labels; by default one with a usual name.
        tokenizer: "embedded" or a tokenizer folder.
        size: R; the shortest side becomes R, then an R x R crop is taken.
        stride: every stride-th frame of a video is kept (the paper: 4).
        min_frames: a video with fewer frames than this at the stride is short, and not stored.
        views: how often each item is tokenized. The first view is the centre crop from frame 0; further ones are
            random crops that start at a random frame below the stride.
        seed: seed of the random views.
        online: decode everything once, for the ledger and the counts, and keep no codes: `toto train` makes them when
            it reads the store, from random crops that start at a random frame below the stride, anew in each epoch.
        keep_pixels: keep the frames beside their codes, for models that take or predict patches. At 128 pixels a frame
            takes 49,152 bytes, its codes 512.
        workers: processes; 0 encodes in this one. None uses every core (with Ray: of the cluster).
        ray: tokenize on a Ray cluster: its address (HOST:PORT, ray://HOST:PORT, auto), or "local" to start one here.
            Source and tokenizer have to be readable under the same names on all of its machines. Needs the extra
            "ray".
        time_limit: seconds that an item may take before it is given up as corrupt (needs workers).
        device: where the tokenizer runs: auto, cpu, cuda, ...
        precision: of the tokenizer's matrix products, fp32 or bf16. In bf16 it is faster, and a few codes in a hundred
            are other ones.
    """

    source: Positional[AnyPath]
    out: AnyPath
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    tokenizer: str = EMBEDDED
    size: int = 128
    stride: int = 4
    min_frames: int = 16
    views: int = 1
    seed: int = 0
    online: bool = False
    keep_pixels: bool = False
    workers: int | None = None
    ray: str | None = None
    time_limit: float = 600.0
    device: str = "auto"
    precision: Arithmetic = "fp32"

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("stride", 1), ("min_frames", 1), ("views", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"must be at least {least}, is {getattr(self, name)}", where=f"--{name.replace('_', '-')}"
                )
        if self.online and (self.views > 1 or self.keep_pixels):
            option = "--views" if self.views > 1 else "--keep-pixels"
            raise ConfigError("keeps nothing of the frames", where=f"--online {option}", fix=f"leave {option} out")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"must not be negative, is {self.workers}", where="--workers")
        if self.ray is not None and self.workers == 0:
            raise ConfigError("a cluster needs at least one worker", where="--workers 0", fix="leave --workers out")
        if not self.time_limit > 0:
            raise ConfigError(f"must be more than 0, is {self.time_limit:g}", where="--time-limit")

    @property
    def framing(self) -> Framing:
        """How items become frames."""
        return Framing(
            size=self.size,
            stride=self.stride,
            min_frames=self.min_frames,
            views=self.views,
            seed=self.seed,
            online=self.online,
        )


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
    catalog = open_source(
        str(config.source),
        clips=config.clips,
        split=config.split,
        image_column=config.image_column,
        label_column=config.label_column,
    )
    with Output(config.out) as output:
        if _plan(config, passport, catalog, output) == "open":
            parts = _make_parts(config, tokenizer, catalog, output)
            _assemble(config, passport, catalog, parts, output)
        output.tidy()
    return TokenStore(config.out)


def _make_parts(config: TokenizeConfig, tokenizer: Tokenizer, catalog: Catalog, output: Output) -> list[dict[str, Any]]:
    """Make all shards that an earlier run hasn't; what is said of every shard, in their order."""
    shards, parts = cut(catalog), output.parts()
    pending = shards[len(parts) :]
    duplicates = find_duplicates(catalog.items)
    became = {row["id"]: row["status"] for part in parts for row in part["ledger"]}
    offered = len(catalog.items)
    done = offered - sum(len(shard) for shard in pending)
    with (
        stop_on_signal() as stop,
        Progress("tokenizing", total=offered, unit="items", done=done) as progress,
        contextlib.closing(_encode(config, tokenizer, pending, duplicates, output)) as encoded,
    ):
        for number, shard in enumerate(pending, start=len(parts)):
            results = []
            for _ in shard:
                result = _as_its_twin(_next(encoded, stop, progress, output), duplicates, became)
                became[result.item.id] = result.status
                results.append(result)
            parts.append(_write_part(config, number, results, tokenizer.grid(config.size, config.size), output))
    return parts


def _as_its_twin(result: Encoded, duplicates: Mapping[str, str], became: Mapping[str, Status]) -> Encoded:
    """A duplicate of an item that can't be used can't be used either."""
    status = became.get(duplicates.get(result.item.id, ""), "ok")
    if result.status != "duplicate" or status == "ok":
        return result
    return replace(result, status=status, reason=f"{result.reason}, which is {status}")


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


def _encode(
    config: TokenizeConfig,
    tokenizer: Tokenizer,
    shards: list[tuple[Item, ...]],
    duplicates: dict[str, str],
    output: Output,
) -> Generator[Encoded, None, None]:
    work = Work(
        tokenizer=config.tokenizer,
        device=config.device,
        precision=config.precision,
        framing=config.framing,
        waiting=output.waiting if config.keep_pixels else None,
        time_limit=config.time_limit,
    )
    least = TASKS_A_WORKER * worker_count(config.workers)
    todo = (task for shard in shards for task in tasks(shard, duplicates, least=max(1, least)))
    return encode_all(todo, duplicates, work, tokenizer=tokenizer, workers=config.workers, ray=config.ray)


def _next(encoded: Iterator[Encoded], stop: StopRequest, progress: Progress, output: Output) -> Encoded:
    try:
        result = next(encoded)
    except TotoError:  # a signal to the whole group of processes reaches the workers too
        if not stop:
            raise
        raise _interrupted(stop, output) from None
    progress.advance(note="" if result.status == "ok" else f"{result.item.id}: {result.status}")
    if stop:
        raise _interrupted(stop, output)
    return result


def _interrupted(stop: StopRequest, output: Output) -> InterruptedRunError:
    return InterruptedRunError(
        f"stopped by {stop.name}", where=output.where, fix="run the same command again to continue"
    )


def _plan(config: TokenizeConfig, passport: Passport, catalog: Catalog, output: Output) -> str:
    """Begin or continue the job in its folder; refuse a folder that holds another one."""
    plan = {
        "passport": passport.to_dict(),
        "catalog_sha256": digest(catalog),
        "inputs": len(catalog.items),
        **_choices(config, catalog),
    }
    if output.is_finished:
        before = read_json(output.folder / MANIFEST, what="shard manifest").get("job")
    elif output.is_begun:
        before = read_json(output.folder / PLAN, what="tokenizing plan")
    elif output.is_foreign:
        raise ConfigError("is not empty and holds no tokenizing job", where=config.out, fix="choose another --out")
    else:
        write_provenance(output.folder, config)
        write_json(output.folder / PLAN, plan)
        output.send(RECORD, PLAN)
        before = plan
    if before != plan:
        known = before if isinstance(before, dict) else {}
        different = ", ".join(name for name in {**plan, **known} if known.get(name) != plan.get(name))
        raise ConfigError(f"holds another job (different: {different})", where=config.out, fix="choose another --out")
    return "finished" if output.is_finished else "open"


def _choices(config: TokenizeConfig, catalog: Catalog) -> dict[str, Any]:
    """The options that decide what the store holds."""
    names = ("size", "stride", "min_frames", "views", "seed")
    chosen = {name: getattr(config, name) for name in names}
    unusual: dict[str, Any] = {"keep_pixels": True} if config.keep_pixels else {}  # other stores stay as they were
    if config.online:
        origin = Origin.named(str(config.source), clips=config.clips, split=config.split, tokenizer=config.tokenizer)
        unusual[ONLINE] = origin.for_job()
    if catalog.form != "imagefolder":
        unusual["form"] = catalog.form
    unusual |= {name: getattr(config, name) for name in CHOSEN if getattr(config, name) is not None}
    return chosen | unusual | ({"precision": config.precision} if config.precision != "fp32" else {})


def _write_part(
    config: TokenizeConfig, number: int, results: list[Encoded], grid: tuple[int, int], output: Output
) -> dict[str, Any]:
    views = [view for result in results for view in result.views]
    shard = None if config.online else write_shard(output.folder, number, [view.codes for view in views], grid)
    if config.keep_pixels and shard:
        waiting = [(view.pixels, len(view.codes)) for view in views if isinstance(view.pixels, Path)]
        clips = (np.memmap(path, np.uint8, "r", shape=(T, config.size, config.size, 3)) for path, T in waiting)
        shard["pixels"] = write_pixels(output.folder, number, clips, (shard["frames"], config.size, config.size))
        for path, _ in waiting:
            path.unlink()
    items = [
        {"id": view_id(result.item.id, place), "kind": result.item.kind, "label": result.item.label}
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
    output.add_part(number, part)
    return part


def _assemble(
    config: TokenizeConfig, passport: Passport, catalog: Catalog, parts: list[dict[str, Any]], output: Output
) -> None:
    """Join the parts' tables and write the manifest."""
    folder = output.folder
    rows = [LedgerRow(**row) for part in parts for row in part["ledger"]]
    ledger = sorted(rows + list(catalog.skipped), key=lambda row: row.id)
    counts = count_by_status(ledger)
    write_ledger(folder, ledger)
    output.send(LEDGER)
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
    write_splits(folder, splits)
    finish_store(
        folder,
        passport=passport,
        stride=config.stride,
        shards=[part["shard"] for part in parts if part["shard"]],
        items=items,
        counts=counts,
        job=read_json(folder / PLAN, what="tokenizing plan"),
        classes=catalog.classes,
    )
    output.send(SPLITS, ITEMS, MANIFEST)


def count_splits(out: AnyPath) -> dict[str, int]:
    """How many items of a store are of each split; empty where its source named none."""
    return dict(sorted(Counter(name or "none" for name in read_splits(out).values()).items()))
