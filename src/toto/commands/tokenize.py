"""`toto tokenize SOURCE --out SHARDS`."""

from __future__ import annotations

from toto.commands.parsing import parse
from toto.commands.printing import classes_line
from toto.media.ledger import summary, unused
from toto.tokens.extract import TokenizeConfig, count_splits, tokenize
from toto.tokens.shards import LEDGER, TokenStore, read_ledger


def run(words: list[str]) -> None:
    """Parse, tokenize, and print what became of the inputs."""
    config = parse(TokenizeConfig, words, verb="tokenize")
    store = tokenize(config)
    tokens = store.frame_count * store.grid[0] * store.grid[1]
    print(f"{config.out}: {len(store)} items, {store.frame_count:,} frames, {tokens:,} tokens on grids of {store.grid}")
    _print_classes(store)
    print(summary(store.manifest["ledger"], config.out / LEDGER))
    rows = read_ledger(store.folder)
    for line in unused(rows, rest_in=config.out / LEDGER):
        print(line)
    if any(row.status == "short" and row.kind == "video" for row in rows):
        print(f"  (--min-frames below {config.min_frames} or a smaller --stride keeps shorter videos)")


def _print_classes(store: TokenStore) -> None:
    """The classes in their order, and the splits, where there are any."""
    classes = store.manifest["classes"]
    if classes:
        print(classes_line(classes))
    splits = count_splits(store.folder)
    if splits:
        print("splits: " + ", ".join(f"{name} {count:,}" for name, count in splits.items()))
