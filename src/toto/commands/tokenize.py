"""`toto tokenize SOURCE --out SHARDS`."""

from __future__ import annotations

from toto.commands.parsing import parse
from toto.media.ledger import summary
from toto.tokens.extract import TokenizeConfig, count_splits, tokenize
from toto.tokens.shards import LEDGER, TokenStore, read_ledger

REASONS_SHOWN = 10
CLASSES_SHOWN = 8


def run(words: list[str]) -> None:
    """Parse, tokenize, and print what became of the inputs."""
    config = parse(TokenizeConfig, words, verb="tokenize")
    store = tokenize(config)
    tokens = store.frame_count * store.grid[0] * store.grid[1]
    print(f"{config.out}: {len(store)} items, {store.frame_count:,} frames, {tokens:,} tokens on grids of {store.grid}")
    _print_classes(store)
    print(f"ledger: {summary(store.manifest['ledger'])}")
    unused = [row for row in read_ledger(store.folder) if row.status not in ("ok", "skipped")]
    for row in unused[:REASONS_SHOWN]:
        print(f"  {row.status:<10}{row.id}: {row.reason}")
    if any(row.status == "short" and row.kind == "video" for row in unused):
        print(f"  (--min-frames below {config.min_frames} or a smaller --stride keeps shorter videos)")
    if len(unused) > REASONS_SHOWN:
        print(f"  and {len(unused) - REASONS_SHOWN} more in {config.out / LEDGER}")


def _print_classes(store: TokenStore) -> None:
    """The classes in their order, and the splits, where there are any."""
    classes = store.manifest["classes"]
    if classes:
        more = f", and {len(classes) - CLASSES_SHOWN} more" if len(classes) > CLASSES_SHOWN else ""
        print(f"{len(classes)} classes, in their order: {', '.join(classes[:CLASSES_SHOWN])}{more}")
    splits = count_splits(store.folder)
    if splits:
        print("splits: " + ", ".join(f"{name} {count:,}" for name, count in splits.items()))
