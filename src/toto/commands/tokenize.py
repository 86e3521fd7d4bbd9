"""`toto tokenize SOURCE --out SHARDS`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from toto.commands.parsing import parse
from toto.media.ledger import summary
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.shards import LEDGER, read_ledger
from toto.tokens.tokenizer import EMBEDDED

REASONS_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tokenize a folder of images and videos (or one file) into a store of shards.

    Run the same command again to continue one that was interrupted.

    Attributes:
        source: the folder; the first folder below it is the label.
        out: the store's folder.
        tokenizer: "embedded", or a tokenizer folder.
        size: the shortest side becomes this, then a square of it is cut out.
        stride: every stride-th frame of a video is kept.
        min_frames: a video with fewer frames than this at the stride is short, and not stored.
        views: tokenize each item this often; views after the first are random crops.
        seed: seed of the random views.
        workers: processes, 0 for none; by default one for every core.
        device: where the tokenizer runs.
    """

    source: Positional[Path]
    out: Path
    tokenizer: str = EMBEDDED
    size: int = 128
    stride: int = 4
    min_frames: int = 16
    views: int = 1
    seed: int = 0
    workers: int | None = None
    device: str = "cpu"


def run(words: list[str]) -> None:
    """Parse, tokenize, and print what became of the inputs."""
    options = parse(Options, words, verb="tokenize")
    store = tokenize(TokenizeConfig(**vars(options)))
    tokens = store.frame_count * store.grid[0] * store.grid[1]
    print(
        f"{options.out}: {len(store)} items, {store.frame_count:,} frames, {tokens:,} tokens on grids of {store.grid}"
    )
    print(f"ledger: {summary(store.manifest['ledger'])}")
    unused = [row for row in read_ledger(store.folder) if row.status not in ("ok", "skipped")]
    for row in unused[:REASONS_SHOWN]:
        print(f"  {row.status:<10}{row.id}: {row.reason}")
    if len(unused) > REASONS_SHOWN:
        print(f"  and {len(unused) - REASONS_SHOWN} more in {options.out / LEDGER}")
