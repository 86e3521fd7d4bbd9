"""`toto shards info|verify|cat|merge|split|export`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from toto.commands.parsing import parse, take_word
from toto.media.encode import write_image, write_video
from toto.media.ledger import summary
from toto.report.sheet import contact_sheet
from toto.runtime.errors import ConfigError, StoreError
from toto.runtime.places import AnyPath
from toto.runtime.remote import RemotePath
from toto.tokens.shard_export import Format, export
from toto.tokens.shard_tools import (
    chosen_by_id,
    chosen_by_label,
    chosen_by_share,
    damaged_files,
    describe,
    find_item,
    merge,
    split,
)
from toto.tokens.shards import LEDGER, TokenStore
from toto.tokens.tokenizer import EMBEDDED, load_tokenizer

CLASSES_SHOWN, NAMES_SHOWN = 10, 5
ANY_RATE = 6.0


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """What stores hold: passport, counts, ledger, classes, bytes a token.

    Attributes:
        stores: shard folders, or their URLs.
        json: print one JSON list.
    """

    stores: Positional[tuple[AnyPath, ...]]
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Read every byte of stores and compare it with the checksums; ends with 1 where a file is damaged.

    Attributes:
        stores: shard folders, or their URLs.
    """

    stores: Positional[tuple[AnyPath, ...]]


@dataclass(frozen=True, kw_only=True)
class CatOptions:
    """Print the codes of an item, or decode them into a picture or a video.

    Attributes:
        store: a shard folder, or its URL.
        item: the item's id, or its number.
        frames: only these, FIRST:END; either may be left out.
        out: decode into this .png (a contact sheet of several frames) or .mp4.
        tokenizer: what decodes: "embedded", or a tokenizer folder.
        scale: enlarge what is written by this factor.
    """

    store: Positional[AnyPath]
    item: Positional[str]
    frames: str = ":"
    out: Path | None = None
    tokenizer: str = EMBEDDED
    scale: int = 2


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Join stores of the same tokenizer, frame size and stride into a new one.

    Attributes:
        stores: shard folders, or their URLs.
        out: the new store.
        prefix: put the folder's name before each id; without it, an id that occurs twice is refused.
        copy: copy the files; without it they are linked where that is possible, and take no space.
        pixels: carry the pixels along, which all stores must hold then, or none.
    """

    stores: Positional[tuple[AnyPath, ...]]
    out: Path
    prefix: bool = False
    copy: bool = False
    pixels: bool = True


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Cut a store into two by share, by labels or by ids; views of one source item stay together.

    Attributes:
        store: a shard folder, or its URL.
        out: a new store for the chosen items.
        rest: a new store for the others, and for the ledger's rows that became no item.
        share: choose this share of the items at random.
        seed: of the random choice.
        labels: choose the items of these labels.
        ids: choose the items that this file names, one id a line.
    """

    store: Positional[AnyPath]
    out: Path
    rest: Path
    share: float | None = None
    seed: int = 0
    labels: tuple[str, ...] = ()
    ids: Path | None = None

    def __post_init__(self) -> None:
        if sum([self.share is not None, bool(self.labels), self.ids is not None]) != 1:
            raise ConfigError(
                "needs exactly one of --share, --labels and --ids", where="toto shards split", fix="name what to choose"
            )
        if self.share is not None and not 0 < self.share < 1:
            raise ConfigError(f"must lie between 0 and 1, is {self.share}", where="--share")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a store as WebDataset tars or Parquet tables.

    Attributes:
        store: a shard folder, or its URL.
        to: webdataset (an .npy of codes and a .json for each item) or parquet (a row for each item).
        out: a new folder.
        items_in_file: at most so many items in a file.
    """

    store: Positional[AnyPath]
    to: Format
    out: Path
    items_in_file: int = 1000


def run(words: list[str]) -> None:
    """Parse, do it, and print what came of it."""
    task, rest = take_word(words, verb="shards", what="TASK", known=list(TASKS))
    kind, do = TASKS[task]
    do(parse(kind, rest, verb=f"shards {task}"))


def info(options: InfoOptions) -> None:
    """Print what stores hold."""
    found = [describe(store) for store in _opened(options.stores)]
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print("\n\n".join(_described(each) for each in found))


def verify(options: VerifyOptions) -> None:
    """Check every file of stores.

    Raises:
        StoreError: some are damaged.
    """
    damaged: dict[str, list[str]] = {}
    for store in _opened(options.stores):
        found = damaged_files(store)
        print(f"{store.folder}: {len(store.checksums) - len(found)} of {len(store.checksums)} files are whole")
        damaged |= {str(store.folder): found} if found else {}
    if damaged:
        names = [f"{folder}/{name}" for folder, found in damaged.items() for name in found]
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise StoreError(
            f"{', '.join(names[:NAMES_SHOWN])}{more} (checksum of the manifest)",
            where=next(iter(damaged)),
            fix="restore the files, or make the store again",
        )


def cat(options: CatOptions) -> None:
    """Print codes, or decode them."""
    store = TokenStore(options.store)
    number = find_item(store, options.item)
    item = store.item(number)
    first, end = _range(options.frames, item.frame_count)
    if options.out is None:
        print(f"{item.id}: frames {first} to {end - 1} of {item.frame_count}, {item.kind}, label {item.label}")
        width = len(str(store.passport.vocab_size - 1))
        for place, frame in enumerate(store.codes(number, first, end - first).tolist(), start=first):
            print(f"frame {place}")
            print("\n".join(" ".join(f"{code:{width}}" for code in line) for line in frame))
        return
    if options.out.suffix not in (".png", ".mp4"):
        raise ConfigError("ends in neither .png nor .mp4", where=options.out, fix="name a picture or a video")
    if options.scale < 1:
        raise ConfigError(f"must be at least 1, is {options.scale}", where="--scale")
    tokenizer = load_tokenizer(options.tokenizer)
    store.passport.require_tokenizer(
        tokenizer.passport, where=f"tokenizer {options.tokenizer}", fix="give --tokenizer, the one that made the store"
    )
    frames = tokenizer.decode(store.codes(number, first, end - first))
    if options.out.suffix == ".mp4":
        write_video(options.out, frames, rate=item.fps / item.stride or ANY_RATE, scale=options.scale)
    else:
        write_image(options.out, contact_sheet(frames, prompt=0, scale=options.scale))
    print(f"{options.out}: {end - first} frames of {item.id}")


def merge_stores(options: MergeOptions) -> None:
    """Merge and say what the new store holds."""
    stores = _opened(options.stores)
    made = merge(stores, options.out, config=options, prefix=options.prefix, copy=options.copy, pixels=options.pixels)
    print(_counted(made))


def split_store(options: SplitOptions) -> None:
    """Split and say what the new stores hold."""
    store = TokenStore(options.store, verify="read")  # what is damaged must not get a new checksum
    if options.share is not None:
        chosen = chosen_by_share(store, options.share, options.seed)
    elif options.ids is not None:
        chosen = chosen_by_id(store, [line for line in options.ids.read_text().splitlines() if line])
    else:
        chosen = chosen_by_label(store, options.labels)
    for made in split(store, chosen, options.out, options.rest, config=options):
        print(_counted(made))


def export_store(options: ExportOptions) -> None:
    """Export and name the files."""
    store = TokenStore(options.store, verify="read")  # what is damaged must not get a new checksum
    files = export(store, options.out, to=options.to, items_in_file=options.items_in_file, config=options)
    print(f"{options.out}: {len(store)} items in {len(files)} files, {files[0].name} to {files[-1].name}")
    print(_accounts(store))


TASKS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "info": (InfoOptions, info),
    "verify": (VerifyOptions, verify),
    "cat": (CatOptions, cat),
    "merge": (MergeOptions, merge_stores),
    "split": (SplitOptions, split_store),
    "export": (ExportOptions, export_store),
}


def _opened(folders: tuple[Path | RemotePath, ...]) -> list[TokenStore]:
    if not folders:
        raise ConfigError("names no store", where="toto shards", fix="give a shard folder")
    return [TokenStore(folder) for folder in folders]


def _range(text: str, frames: int) -> tuple[int, int]:
    """Read FIRST:END."""
    first, colon, end = text.partition(":")
    try:
        found = int(first or 0), int(end or frames)
    except ValueError:
        found = 0, 0
    if not colon or not 0 <= found[0] < found[1] <= frames:
        raise ConfigError(f"{text!r} is no range of {frames} frames", where="--frames", fix=f"write 0:{frames}")
    return found


def _counted(store: TokenStore) -> str:
    return f"{store.folder}: {len(store)} items, {store.frame_count:,} frames; {_accounts(store)}"


def _accounts(store: TokenStore) -> str:
    return summary(store.manifest["ledger"], store.folder / LEDGER)


def _described(found: dict[str, Any]) -> str:
    passport, length, classes = found["passport"], found["frames_in_an_item"], found["classes"]
    kinds = ", ".join(f"{count:,} {kind}s" for kind, count in found["kinds"].items() if count)
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(classes.items())[:CLASSES_SHOWN])
    more = f" and {len(classes) - CLASSES_SHOWN} more" if len(classes) > CLASSES_SHOWN else ""
    pixels = f", and {found['pixel_bytes']:,} bytes of pixels" if found["pixel_bytes"] else ""
    rows = {
        "tokenizer": f"{passport['kind']} {passport['weights_sha256'][:12]}, {passport['vocab_size']:,} codes",
        "frames of": " x ".join(map(str, passport["frame_size"])) + " pixels, grid "
        + " x ".join(map(str, passport["grid"])) + f", stride {found['stride']}",
        "items": f"{found['items']:,} ({kinds})",
        "frames": f"{found['frames']:,}; {length['least']:,} to {length['most']:,} in an item, "
        f"median {length['median']:,g}",
        "tokens": f"{found['tokens']:,}, {found['bytes_a_token']:.3f} bytes each in {found['files']} files{pixels}",
        "classes": f"{len(classes)}: {shown}{more}" if classes else "none",
        "ledger": summary(found["ledger"], f"{found['folder']}/{LEDGER}"),
    }  # fmt: skip
    return "\n".join([found["folder"], *(f"  {name:<11}{value}" for name, value in rows.items())])
