"""`toto tokenize SOURCE --out SHARDS`."""

from __future__ import annotations

from toto.commands.parsing import parse
from toto.media.ledger import summary
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.shards import LEDGER, read_ledger

REASONS_SHOWN = 10


def run(words: list[str]) -> None:
    """Parse, tokenize, and print what became of the inputs."""
    config = parse(TokenizeConfig, words, verb="tokenize")
    store = tokenize(config)
    tokens = store.frame_count * store.grid[0] * store.grid[1]
    print(f"{config.out}: {len(store)} items, {store.frame_count:,} frames, {tokens:,} tokens on grids of {store.grid}")
    print(f"ledger: {summary(store.manifest['ledger'])}")
    unused = [row for row in read_ledger(store.folder) if row.status not in ("ok", "skipped")]
    for row in unused[:REASONS_SHOWN]:
        print(f"  {row.status:<10}{row.id}: {row.reason}")
    if any(row.status == "short" and row.kind == "video" for row in unused):
        print(f"  (--min-frames below {config.min_frames} or a smaller --stride keeps shorter videos)")
    if len(unused) > REASONS_SHOWN:
        print(f"  and {len(unused) - REASONS_SHOWN} more in {config.out / LEDGER}")
