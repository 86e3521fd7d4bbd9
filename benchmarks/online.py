"""Tokens a second of training data that is encoded as it is read, beside stored codes of the same videos.

python -m benchmarks online
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.timing import HEADER, interleaved, row
from toto.media import sample
from toto.tokens.extract import TokenizeConfig, tokenize
from toto.tokens.online import Encoders, OnlineStore, Pieces
from toto.tokens.shards import TokenStore
from toto.training.mixture import Mixture
from toto.training.source import SourceConfig

T, STRIDE, BATCH, BATCHES, CLIPS = 16, 4, 4, 2, 12


def main() -> None:
    """Print both rates; the centre crops are compared with what is stored first."""
    with tempfile.TemporaryDirectory() as scratch:
        online, stored, folder = (Path(scratch) / name for name in ("online", "stored", "clips"))
        folder.mkdir()
        for clip in sample.scenes("train")[:CLIPS]:
            shutil.copy(clip, folder)
        for out in (online, stored):
            tokenize(TokenizeConfig(source=folder, out=out, stride=STRIDE, online=out is online))
        check(online, stored)
        ways: dict[str, Callable[[], None]] = {"stored": reader(stored, Encoders())}
        counts = sorted({0, 1, os.cpu_count() or 1})
        pools = [Encoders(workers=count) for count in counts]
        for count, pool in zip(counts, pools, strict=True):
            ways[f"online, {count} workers"] = reader(online, pool)
        rows, cols = TokenStore(online).grid
        print(f"Windows of {T} frames of the sample's scenes, centre and random crops of 128 px\n\n{HEADER}")
        for way, seconds in interleaved(ways, runs=3, warmup=1).items():
            print(row(way, seconds, units=BATCHES * BATCH * T * rows * cols, unit="tokens"))
        for pool in pools:
            pool.close()


def reader(folder: Path, encoders: Encoders) -> Callable[[], None]:
    """Reads some batches, others each time it is called."""
    mixture = Mixture((SourceConfig(path=folder, weight=1),), frames=T, seed=0, encoders=encoders)
    steps = iter(range(10**6))

    def read() -> None:
        for _ in range(BATCHES):
            mixture.batch(next(steps), BATCH)

    return read


def check(online: Path, stored: Path) -> None:
    """Compare the first window of every item."""
    store = TokenStore(stored)
    items = np.flatnonzero(store.column("frame_count") >= T)[:, None]
    made = np.empty((len(items), T, *store.grid), np.uint16)
    OnlineStore(TokenStore(online), Encoders()).read(Pieces(items=items, starts=np.zeros_like(items)), T, made, None)
    for place, item in enumerate(items[:, 0].tolist()):
        assert np.array_equal(made[place], store.codes(item, 0, T).numpy())


if __name__ == "__main__":
    main()
