"""`toto tokenizer inspect`: what tokenizers keep of a picture, and how they use their codes."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor

from toto.commands.parsing import parse
from toto.media import sample
from toto.media.catalog import Item
from toto.media.catalogs import open_source
from toto.media.decode import Kind
from toto.media.ledger import LedgerRow, count_by_status, summary, unused
from toto.media.reading import read_item
from toto.media.transforms import square
from toto.report.inspection import Accounts, Inspected, Part, collapse_warnings, side_by_side, write_inspection_page
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.files import write_json
from toto.runtime.places import AnyPath, as_path
from toto.runtime.progress import Progress, say
from toto.runtime.provenance import as_plain, versions, write_provenance
from toto.tokens.accounts import is_split
from toto.tokens.quality import FidelityMeter
from toto.tokens.shards import ITEMS, LEDGER, MANIFEST, TokenStore, read_ledger, shard_name, write_ledger
from toto.tokens.statistics import CodeCounter
from toto.tokens.tokenizer import EMBEDDED, Arithmetic, Tokenizer, load_tokenizer

FORMAT, VERSION = "toto-inspection", 1
FIGURES, PAGE = "inspection.json", "index.html"
SHOWN_FRAMES = 7
FRAMES_AT_ONCE = 64
KEPT_FOR_ONE = 8

Offered = TypeVar("Offered")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What tokenizers keep of a picture (PSNR, SSIM) and how they use their codes, side by side.

    Attributes:
        tokenizer: "embedded", or tokenizer folders; several are compared on the same frames.
        data: images and videos in any form that `toto tokenize` reads, or a store of shards, whose codes are looked at
            as they are; without it the held-out scenes and photographs of the embedded sample.
        clips: the folder that holds what a manifest names; by default the manifest's own.
        split: look at this split of DATA alone.
        image_column: of parquet files, the column with the bytes of images or videos; by default one with a usual name.
        size: of media: the shortest side becomes this, then a square of it is cut out.
        stride: of videos: every stride-th frame is looked at.
        frames: at most so many frames are looked at, spread evenly over the items.
        out: a folder for the page (index.html) and the figures (inspection.json).
        device: auto, cpu, cuda, ...
        precision: of the tokenizers' matrix products, fp32 or bf16.
    """

    tokenizer: tuple[str, ...] = (EMBEDDED,)
    data: str | None = None
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None
    size: int = 128
    stride: int = 6
    frames: int = 10_000
    out: Path | None = None
    device: str = "auto"
    precision: Arithmetic = "fp32"

    def __post_init__(self) -> None:
        for name in ("size", "stride", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"--{name}")
        if not self.tokenizer:
            raise ConfigError("names no tokenizer", where="--tokenizer", fix=f"give {EMBEDDED!r} or a folder")
        if self.data is None and (self.clips or self.split or self.image_column):
            where = "--clips, --split or --image-column"
            raise ConfigError("names no source of its own", where=where, fix="give --data")


def run(words: list[str]) -> None:
    """Parse, look, print the table, and write the page where one is asked for."""
    options = parse(InspectOptions, words, verb="tokenizer inspect")
    tokenizers = load_all(options)
    parts = inspect(tokenizers, options)
    print_figures(parts)
    _close(parts, options.out)
    if options.out is not None:
        write_json(options.out / FIGURES, _record(parts, tokenizers, options))
        made = ", ".join(f"{name} {version}" for name, version in versions().items())
        foot = f"Made by `{shlex.join(['toto', *sys.argv[1:]])}` with {made}."
        write_inspection_page(options.out / PAGE, parts, foot=foot)
        print(options.out / PAGE)


def load_all(options: InspectOptions) -> dict[str, Tokenizer]:
    """The tokenizers by display name: "embedded" or the folder's name, numbered where several have the same."""
    device = pick_device(options.device)
    names = [name if name == EMBEDDED else Path(name).resolve().name for name in options.tokenizer]
    seen: Counter[str] = Counter()
    loaded = {}
    for name, place in zip(names, options.tokenizer, strict=True):
        seen[name] += 1
        shown = f"{name} ({seen[name]})" if names.count(name) > 1 else name
        loaded[shown] = load_tokenizer(place, device=device, precision=options.precision)
    return loaded


def inspect(tokenizers: dict[str, Tokenizer], options: InspectOptions) -> list[Part]:
    """Every tokenizer on every source; what can't be read is printed with the reason and counted."""
    if options.data is not None and is_store(as_path(options.data)):
        if options.clips:
            raise ConfigError("a store names no clips elsewhere", where="--clips", fix="leave it out")
        if options.image_column:
            raise ConfigError("a store has no columns to name", where="--image-column", fix="leave it out")
        store = TokenStore(options.data)
        for name, tokenizer in tokenizers.items():
            store.passport.require_tokenizer(
                tokenizer.passport, where=f"tokenizer {name}", fix="give --tokenizer, the one the store was made with"
            )
        _begin(options)
        return [inspect_store(options.data, store, tokenizers, options)]
    for name, tokenizer in tokenizers.items():
        try:
            tokenizer.grid(options.size, options.size)
        except MediaError as error:
            raise ConfigError(error.what, where=f"--size, tokenizer {name}", fix=error.fix) from None
    if options.data is not None:
        catalog = open_source(options.data, clips=options.clips, split=options.split, image_column=options.image_column)
        listed = {options.data: catalog}
    else:
        root = sample.sample_folder()
        listed = {f"held-out {kind}": open_source(str(root / kind / "heldout")) for kind in ("scenes", "photographs")}
    _begin(options)
    return [inspect_media(name, list(each.items), each.skipped, tokenizers, options) for name, each in listed.items()]


def is_store(place: AnyPath) -> bool:
    """Whether a folder is a store of shards; a folder of media may hold a manifest of its own."""
    tables = (ITEMS, LEDGER, shard_name(0))
    return (place / MANIFEST).is_file() and any((place / name).is_file() for name in tables)


def inspect_media(
    name: str,
    offered: list[Item],
    skipped: tuple[LedgerRow, ...],
    tokenizers: dict[str, Tokenizer],
    options: InspectOptions,
) -> Part:
    """Encode and decode frames of media files.

    Raises:
        ConfigError: nothing could be read.
    """
    items = evenly(offered, options.frames)
    allowance = Allowance(options.frames, [item.kind for item in items])
    gauges = {shown: Gauge(tokenizer) for shown, tokenizer in tokenizers.items()}
    originals, rows, cut = Spread(SHOWN_FRAMES), list[LedgerRow](), 0
    with Progress(f"inspecting {name}", total=len(items), unit="items") as progress:
        for item in items:
            most = allowance.next(item.kind)
            try:
                frames = read_squares(item, options, most=most + 1)  # one more tells whether there are more
            except MediaError as error:
                rows.append(LedgerRow(id=item.id, kind=item.kind, status=error.status, reason=error.what))
            else:
                cut += len(frames) > most
                frames = frames[:most]
                allowance.take(len(frames))
                rows.append(LedgerRow(id=item.id, kind=item.kind, status="ok", frames=len(frames)))
                originals.add(frames)
                for gauge in gauges.values():
                    gauge.add(frames)
            progress.advance()
    read = [row for row in rows if row.status == "ok"]
    unusable = (*(row for row in rows if row.status != "ok"), *skipped)
    failed = sum(row.status in ("short", "corrupt") for row in unusable)
    if not read:
        first = next((row.reason for row in rows), "there are none")
        raise ConfigError(f"nothing could be read (the first: {first})", where=name, fix="restore the files")
    frames_read = sum(row.frames for row in read)
    opened = {item.id for item in items}
    left_out = tuple(
        LedgerRow(id=item.id, kind=item.kind, status="skipped", reason="not opened: more items than --frames")
        for item in offered
        if item.id not in opened
    )
    beyond = len(left_out)
    accounts = Accounts(
        read=len(read),
        failed=failed,
        skipped=len(unusable) - failed,
        beyond_limit=beyond,
        frames=frames_read,
        frames_available=None if cut or beyond else frames_read,
        items_cut=cut,
        unusable=unusable,
    )
    print(f"{name}: {accounts.in_words()}")
    shown_frames = originals.frames()
    return Part(
        name=name,
        kind="media",
        size=(options.size, options.size),
        accounts=accounts,
        ledger=(*rows, *skipped, *left_out),
        originals=shown_frames,
        inspected=tuple(gauge.inspected(shown, shown_frames) for shown, gauge in gauges.items()),
    )


def inspect_store(name: str, store: TokenStore, tokenizers: dict[str, Tokenizer], options: InspectOptions) -> Part:
    """Look at the codes of a store, and decode a few of its frames."""
    split = options.split
    numbers = range(len(store)) if split is None else np.flatnonzero(is_split(store, split)).tolist()
    items = [(number, store.item(number)) for number in evenly(numbers, options.frames)]
    allowance = Allowance(options.frames, [item.kind for _, item in items])
    counter, examples, cut, frames = CodeCounter(store.passport.vocab_size), Spread(SHOWN_FRAMES), 0, 0
    with Progress(f"inspecting {name}", total=len(items), unit="items") as progress:
        for number, item in items:
            most = allowance.next(item.kind)
            codes = store.codes(number, 0, min(most, item.frame_count))
            cut += item.frame_count > most
            allowance.take(len(codes))
            counter.add(codes)
            examples.add(codes)
            frames += len(codes)
            progress.advance()
    accounts = Accounts(
        read=len(items),
        failed=0,
        skipped=0,
        beyond_limit=len(numbers) - len(items),
        frames=frames,
        frames_available=int(store.column("frame_count")[numbers].sum()),
        items_cut=cut,
        unusable=(),
    )
    size = store.passport.frame_size
    assert size is not None
    print(f"{name}: a store of {size[0]} x {size[1]} pixel frames at stride {store.stride}; {accounts.in_words()}")
    statistics, shown = counter.statistics(), examples.frames()
    return Part(
        name=name,
        kind="shards",
        size=size,
        accounts=accounts,
        ledger=tuple(read_ledger(store.folder)),
        originals=None,
        inspected=tuple(
            Inspected(tokenizer=each, fidelity=None, codes=statistics, shown=tokenizer.decode(shown).cpu())
            for each, tokenizer in tokenizers.items()
        ),
    )


def read_squares(item: Item, options: InspectOptions, *, most: int) -> UInt8[Tensor, "T size size 3"]:
    """At most so many frames of an item, cut to squares; what follows them in the file isn't read."""
    return square(read_item(item, stride=options.stride, limit=most).frames, options.size)


def evenly(offered: Sequence[Offered], most: int) -> list[Offered]:
    """At most so many of a sequence, from the middle of equal stretches.

    >>> evenly("abcdefghi", 3)
    ['b', 'e', 'h']
    """
    if len(offered) <= most:
        return list(offered)
    return [offered[(2 * place + 1) * len(offered) // (2 * most)] for place in range(most)]


@final
class Allowance:
    """Deals out frames: an image gets one, and the videos share the rest evenly as they come."""

    def __init__(self, frames: int, kinds: Sequence[Kind]):
        self._left = frames
        self._images, self._videos = kinds.count("image"), kinds.count("video")

    def next(self, kind: Kind) -> int:
        """How many frames the next item may give; its turn is over then."""
        if kind == "image":
            self._images -= 1
            return 1
        share = (self._left - self._images) // self._videos
        self._videos -= 1
        return share

    def take(self, frames: int) -> None:
        """So many frames were really there."""
        self._left -= frames


@final
class Spread:
    """Keeps a few frames that lie evenly over all that come by, without knowing how many will."""

    def __init__(self, most: int):
        self._most = most
        self._every, self._seen = 1, 0
        self._kept: list[Tensor] = []

    def add(self, frames: Tensor) -> None:
        """See some frames `[T, ...]`."""
        for number, frame in enumerate(frames, self._seen):
            if number % self._every == 0:
                self._kept.append(frame.clone())
                if len(self._kept) > KEPT_FOR_ONE * self._most:
                    del self._kept[1::2]
                    self._every *= 2
        self._seen += len(frames)

    def frames(self) -> Tensor:
        """The frames that were kept, in their order."""
        return torch.stack(evenly(self._kept, self._most))


@final
class Gauge:
    """One tokenizer, and what is measured of it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._codes = CodeCounter(tokenizer.vocab_size)
        self._fidelity = FidelityMeter()

    def add(self, frames: UInt8[Tensor, "T H W 3"]) -> None:
        """Encode and decode all frames of an item."""
        codes = []
        for start in range(0, len(frames), FRAMES_AT_ONCE):
            some = frames[start : start + FRAMES_AT_ONCE]
            codes.append(self.tokenizer.encode(some))
            self._fidelity.add(some, self.tokenizer.decode(codes[-1]).cpu())
        self._codes.add(torch.cat(codes).cpu())

    def inspected(self, name: str, originals: UInt8[Tensor, "T H W 3"]) -> Inspected:
        """The figures, and what becomes of a few frames."""
        shown = self.tokenizer.decode(self.tokenizer.encode(originals)).cpu()
        return Inspected(
            tokenizer=name, fidelity=self._fidelity.fidelity(), codes=self._codes.statistics(), shown=shown
        )


def print_figures(parts: Sequence[Part]) -> None:
    """The figures as a table, a column for each tokenizer on each source, and what looks wrong."""
    heading, *rows = side_by_side(parts)
    table = Table(title="What the tokenizer keeps, and how it uses its codes")
    for name in heading:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    for line in collapse_warnings(parts):
        say(f"warning: {line}")


def _begin(options: InspectOptions) -> None:
    """Claim the output folder before hours are spent; another job's is refused."""
    if options.out is not None:
        write_provenance(options.out, options)


def _close(parts: Sequence[Part], out: Path | None) -> None:
    """Store what became of every input, where there is a folder, and print the counts and what could not be read."""
    stored = None if out is None else out / LEDGER
    if out is not None:
        prefix = len(parts) > 1
        write_ledger(
            out,
            [replace(row, id=f"{part.name}/{row.id}") if prefix else row for part in parts for row in part.ledger],
        )
    for part in parts:
        print(f"{part.name}: {summary(count_by_status(part.ledger), stored)}")
        for line in unused(part.ledger, rest_in=stored):
            print(line)


def _record(parts: Sequence[Part], tokenizers: dict[str, Tokenizer], options: InspectOptions) -> dict[str, Any]:
    """Everything that was found, as JSON holds it."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizers": [
            {"name": name, "place": place, "passport": tokenizer.passport.to_dict()}
            for (name, tokenizer), place in zip(tokenizers.items(), options.tokenizer, strict=True)
        ],
        "parts": [
            {
                "name": part.name,
                "kind": part.kind,
                "size": list(part.size),
                "accounts": {"offered": part.accounts.offered} | as_plain(part.accounts),
                "figures": [
                    {
                        "tokenizer": each.tokenizer,
                        "fidelity": None if each.fidelity is None else _finite(as_plain(each.fidelity)),
                        "codes": as_plain(each.codes),
                    }
                    for each in part.inspected
                ],
            }
            for part in parts
        ],
    }


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity, which is the PSNR of equal frames."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in figures.items()}  # fmt: skip
