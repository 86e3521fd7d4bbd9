"""`toto doctor SOURCE`: what is wrong with this data, and what tokenizing it will take, before hours are spent."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from toto.commands.parsing import parse
from toto.media.catalog import Catalog, Item, find_duplicates, units
from toto.media.catalogs import open_source
from toto.media.checks import CheckConfig, Checked, Finding, check_unit, find_problems, read_speed
from toto.media.ledger import LedgerRow, Status, count_by_status, summary
from toto.runtime.device import one_thread, pick_device
from toto.runtime.errors import ConfigError
from toto.runtime.files import write_json
from toto.runtime.places import AnyPath
from toto.runtime.progress import Progress, duration
from toto.runtime.provenance import as_plain, versions
from toto.runtime.workers import Lost, Workers, worker_count
from toto.tokens.tokenizer import EMBEDDED, load_tokenizer

FORMAT, VERSION = "toto-doctor", 1
ENCODED_FRAMES, ENCODED_SECONDS = 8, 1.0
LARGEST_NAMES = 12
Unit = tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Look over a source before it is tokenized. The exit code is 0 where nothing is wrong, 1 where something is.

    Attributes:
        source: what `toto tokenize` takes: a folder, a file, a manifest, a container, or KIND:PATH.
        clips: the folder that holds what a manifest names; by default the manifest's own.
        split: look at this split alone.
        image_column: of parquet files, the column with the bytes of images or videos; by default one with a usual name.
        label_column: of parquet files and CSVs, the column with the labels; by default one with a usual name.
        sample: decode this many items, spread evenly; 0 decodes all. Names, sizes and labels are always all read.
        tokenizer: "embedded" or a tokenizer folder, for the estimate.
        size: as in `toto tokenize`.
        stride: as in `toto tokenize`.
        min_frames: as in `toto tokenize`.
        keep_pixels: count the pixels that `--keep-pixels` stores.
        workers: processes; 0 decodes in this one, which a crash of the decoder then ends. None uses every core.
        time_limit: seconds that an item may take.
        device: where the tokenizer runs: auto, cpu, cuda, ...
        out: write the report to this JSON file.
    """

    source: Positional[AnyPath]
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    sample: int = 200
    tokenizer: str = EMBEDDED
    size: int = 128
    stride: int = 4
    min_frames: int = 16
    keep_pixels: bool = False
    workers: int | None = None
    time_limit: float = 600.0
    device: str = "auto"
    out: Path | None = None

    def __post_init__(self) -> None:
        least = {"sample": 0, "size": 1, "stride": 1, "min_frames": 1, "workers": 0, "time_limit": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"must be at least {lowest}, is {value}", where=f"--{name.replace('_', '-')}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What tokenizing the whole source will take.

    Attributes:
        items: that will be usable, by the share of those that were decoded.
        frames: kept at the stride.
        tokens: their codes.
        storage_bytes: of the store.
        seconds: with these workers, on this machine.
        encode_frames_per_second: of the tokenizer, in one process.
        grid: rows and columns of a frame's codes.
    """

    items: int
    frames: int
    tokens: int
    storage_bytes: int
    seconds: float
    encode_frames_per_second: float
    grid: tuple[int, int]


def run(words: list[str]) -> int:
    """Parse, examine, print, and write the report where one is asked for; returns the exit code."""
    options = parse(DoctorOptions, words, verb="doctor")
    report = examine(options)
    if options.out:
        write_json(options.out, report)
    print_report(report)
    return 1 if report["problems"] else 0


def examine(options: DoctorOptions) -> dict[str, Any]:
    """The report on a source, as JSON holds it.

    Raises:
        ConfigError: there is nothing to read.
    """
    catalog = open_source(
        str(options.source),
        clips=options.clips,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    speed = encode_speed(options, 1 if all(item.kind == "image" for item in catalog.items) else ENCODED_FRAMES)
    duplicates = find_duplicates(catalog.items)
    items = evenly(catalog.items, options.sample)
    checked = check_all(items, options)
    findings = find_problems(catalog, checked, duplicates, options.size)
    workers = max(1, worker_count(options.workers))
    estimate = estimate_cost(catalog, checked, speed, workers, options)
    place = (options.out.parent if options.out else Path()).resolve()
    free = shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists())).free
    if estimate.storage_bytes > free:
        needs = f"the store needs {size(estimate.storage_bytes)}, {size(free)} are free in {place}"
        findings.insert(0, Finding(what="disk", count=1, of=1, problem=True, examples=(needs,), advice="make room"))
    rows = ledger(catalog, checked, duplicates)
    labels = Counter(item.label for item in catalog.items if item.label is not None)
    splits = Counter(item.split for item in catalog.items if item.split is not None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": str(options.source),
        "form": catalog.form,
        "items": len(catalog.items),
        "named_but_unusable": len(catalog.skipped),
        "kinds": dict(Counter(item.kind for item in catalog.items)),
        "classes": {name: labels[name] for name in catalog.classes or sorted(labels)},
        "splits": dict(sorted(splits.items())),
        "decoded": len(checked),
        "ledger": {"counts": count_by_status(rows), "rows": [as_plain(row) for row in rows if row.status != "ok"]},
        "problems": sum(finding.problem for finding in findings),
        "findings": as_plain(findings),
        "codecs": codecs(checked),
        "sizes": sizes(checked),
        "read_megabytes_per_second": read_speed(item.path for item in items if isinstance(item.path, Path)),
        "free_bytes": free,
        "workers": workers,
        "estimate": as_plain(estimate),
        "options": as_plain(options),
        "versions": versions(),
    }


def ledger(catalog: Catalog, checked: list[Checked], duplicates: dict[str, str]) -> list[LedgerRow]:
    """What tokenizing would make of every input; one that the sample left out is skipped."""
    seen = {each.id: each for each in checked}
    rows = []
    for item in catalog.items:
        found = seen.get(item.id)
        status: Status = "skipped" if found is None else found.status
        reason = "not decoded: beyond --sample" if found is None else found.reason
        if item.id in duplicates:
            original = seen.get(duplicates[item.id])
            usable = original is None or original.status == "ok"
            status = "duplicate" if usable or original is None else original.status
            reason = f"the same bytes as {duplicates[item.id]}" + ("" if usable else f", which is {status}")
        frames = found.frames if found and status == "ok" else 0
        rows.append(LedgerRow(id=item.id, kind=item.kind, status=status, reason=reason, frames=frames))
    return [*rows, *catalog.skipped]


def evenly(items: tuple[Item, ...], count: int) -> tuple[Item, ...]:
    """`count` items spread evenly over all, or all for 0.

    >>> len(evenly((), 3))
    0
    """
    if not count or count >= len(items):
        return items
    return tuple(items[place * len(items) // count] for place in range(count))


def check_all(items: tuple[Item, ...], options: DoctorOptions) -> list[Checked]:
    """Decode the items in worker processes; one that crashes the decoder or takes too long is corrupt."""
    config = CheckConfig(size=options.size, stride=options.stride, min_frames=options.min_frames)
    todo = units(items)
    workers = min(worker_count(options.workers), len(todo))
    checked: list[Checked] = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("examining", total=len(items), unit="items"))
        results: Iterable[tuple[Unit, tuple[Checked, ...] | Lost]] = ((unit, check_unit(unit, config)) for unit in todo)
        if workers:
            pool = stack.enter_context(Workers(_start_worker, _work, (config,), count=workers, what="the decoder"))
            results = pool.in_order(todo, limit=lambda unit: options.time_limit * len(unit))
        for unit, found in results:
            if isinstance(found, Lost):
                checked += [Checked(id=each.id, kind=each.kind, status="corrupt", reason=found.reason) for each in unit]
            else:
                checked += found
            progress.advance(
                len(unit), note="" if checked[-1].status == "ok" else f"{unit[-1].id}: {checked[-1].status}"
            )
    return checked


_config: CheckConfig | None = None


def _start_worker(config: CheckConfig) -> None:
    global _config
    torch.set_num_threads(1)
    _config = config


def _work(unit: Unit) -> tuple[Checked, ...]:
    assert _config is not None
    return check_unit(unit, _config)


def encode_speed(options: DoctorOptions, batch: int) -> tuple[float, tuple[int, int]]:
    """Frames a second that one process encodes, `batch` at once, and the grid of a frame."""
    device = pick_device(options.device)
    tokenizer = load_tokenizer(options.tokenizer, device=device)
    grid = tokenizer.grid(options.size, options.size)
    frames = torch.randint(256, (batch, options.size, options.size, 3), dtype=torch.uint8, device=device)
    with one_thread():
        tokenizer.encode(frames[:1]).cpu()
        began, done = time.perf_counter(), 0
        while not done or time.perf_counter() - began < ENCODED_SECONDS:
            tokenizer.encode(frames).cpu()
            done += batch
        return done / (time.perf_counter() - began), grid


def estimate_cost(
    catalog: Catalog,
    checked: list[Checked],
    speed: tuple[float, tuple[int, int]],
    workers: int,
    options: DoctorOptions,
) -> Estimate:
    """Scale what was decoded up to the whole source, images and videos apart."""
    rate, grid = speed
    items = frames = 0.0
    reading = 0.0
    for kind, count in Counter(item.kind for item in catalog.items).items():
        seen = [each for each in checked if each.kind == kind]
        usable = [each for each in seen if each.status == "ok"]
        share = count / len(seen) if seen else 0.0
        items += share * len(usable)
        frames += share * sum(each.frames for each in usable)
        reading += share * sum(each.decode_seconds + each.resize_seconds for each in seen)
    encoders = workers if pick_device(options.device).type == "cpu" else 1
    tokens = round(frames) * grid[0] * grid[1]
    pixels = round(frames) * 3 * options.size**2 if options.keep_pixels else 0
    return Estimate(
        items=round(items),
        frames=round(frames),
        tokens=tokens,
        storage_bytes=2 * tokens + pixels,
        seconds=reading / workers + frames / rate / encoders,
        encode_frames_per_second=rate,
        grid=grid,
    )


def codecs(checked: list[Checked]) -> dict[str, dict[str, float]]:
    """For every codec: items, frames that were decoded, frames a second of one process."""
    by_codec: dict[str, list[Checked]] = defaultdict(list)
    for each in checked:
        if each.status != "corrupt":
            by_codec[each.codec].append(each)
    found = {}
    for codec, members in sorted(by_codec.items(), key=lambda pair: -len(pair[1])):
        frames, seconds = sum(each.decoded for each in members), sum(each.decode_seconds for each in members)
        found[codec] = {"items": len(members), "frames": frames, "frames_per_second": frames / max(seconds, 1e-9)}
    return found


def sizes(checked: list[Checked]) -> dict[str, int]:
    """How many decoded items have each size "WIDTHxHEIGHT", the most frequent first."""
    counts = Counter(f"{each.width}x{each.height}" for each in checked if each.status != "corrupt")
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def size(count: float) -> str:
    """Bytes as a person says them.

    >>> size(512), size(2_500_000)
    ('512 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def print_report(report: dict[str, Any]) -> None:
    """The report as a person reads it: what there is, what is wrong, what it will take."""
    console = Console()
    kinds = ", ".join(f"{count:,} {kind}s" for kind, count in report["kinds"].items())
    print(f"{report['source']}: {report['form']}, {kinds}, {len(report['classes'])} classes", end="")
    splits = ", ".join(f"{name} {count:,}" for name, count in report["splits"].items())
    print((f", splits: {splits}" if splits else "") + f"; {report['decoded']:,} decoded")
    if report["findings"]:
        table = Table(title="Findings", title_justify="left", show_lines=True)
        for heading in ("what", "how many", "such as", "what to do"):
            table.add_column(heading, overflow="fold")
        for finding in report["findings"]:
            name = f"[bold red]{finding['what']}[/]" if finding["problem"] else finding["what"]
            many = f"{finding['count']:,} of {finding['of']:,}"
            table.add_row(name, many, _escaped("\n".join(finding["examples"][:2])), finding["advice"])
        console.print(table)
    table = Table(title="Decoding, one process", title_justify="left")
    for heading in ("codec", "items", "frames", "frames/s"):
        table.add_column(heading, justify="left" if heading == "codec" else "right")
    for codec, row in report["codecs"].items():
        table.add_row(codec, f"{row['items']:,}", f"{row['frames']:,}", f"{row['frames_per_second']:,.0f}")
    console.print(table)
    print(f"sizes: {_first(report['sizes'])}")
    read = report["read_megabytes_per_second"]
    print(f"disk: {'too little to measure reading' if read is None else f'reads {read:,.0f} MB/s'}", end="")
    print(f", {size(report['free_bytes'])} free")
    _print_estimate(report)
    problems = [finding["what"] for finding in report["findings"] if finding["problem"]]
    print(summary(report["ledger"]["counts"], report["options"]["out"]))
    verdict = f"problems found: {', '.join(problems)}" if problems else "nothing wrong found"
    sampled = (
        "" if report["decoded"] == report["items"] else f" (in {report['decoded']:,} of {report['items']:,} items)"
    )
    print(verdict + sampled)


def _print_estimate(report: dict[str, Any]) -> None:
    estimate, options = report["estimate"], report["options"]
    rows, cols = estimate["grid"]
    print(
        f"to tokenize ({options['tokenizer']}, {options['size']} px, stride {options['stride']}): "
        f"{estimate['frames']:,} frames of {rows} x {cols} = {estimate['tokens']:,} tokens, "
        f"{size(estimate['storage_bytes'])}, about {duration(estimate['seconds'])} with {report['workers']} workers "
        f"({estimate['encode_frames_per_second']:,.0f} frames/s encoded by one)"
    )


def _first(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:LARGEST_NAMES])
    more = len(counts) - LARGEST_NAMES
    return (shown or "none") + (f", and {more} more" if more > 0 else "")


def _escaped(text: str) -> str:
    """Square brackets in names are no markup."""
    return text.replace("[", r"\[")
