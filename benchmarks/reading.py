"""Shuffled reading of windows into batches, against a plain numpy memory-map loop that copies the same windows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import HEADER, interleaved, row
from toto.tokens.passport import Passport
from toto.tokens.shards import StoredItem, finish_store, write_ledger, write_shard
from toto.training.mixture import Mixture, SourceConfig, sequences_of

ITEMS, FRAMES, T, GRID, BATCH, BATCHES = 64, 160, 16, (16, 16), 16, 20


def make_store(folder: Path) -> Path:
    """A store of 64 items of 160 frames at 16 x 16."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 8192, (FRAMES, *GRID), dtype=np.uint16) for _ in range(ITEMS)]
    folder.mkdir()
    shard = write_shard(folder, 0, codes, GRID)
    items = [
        StoredItem(id=str(n), kind="video", label=None, first_frame=n * FRAMES, frame_count=FRAMES, fps=30, stride=4)
        for n in range(ITEMS)
    ]
    write_ledger(folder, [])
    passport = Passport(
        kind="vqvae", weights_sha256="0" * 64, preprocessing="", vocab_size=8192, frame_size=(128, 128), grid=GRID
    )
    finish_store(folder, passport=passport, stride=4, shards=[shard], items=items, counts={}, job={})
    return folder


def main() -> None:
    """Print windows a second of both; their contents are compared first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_store(Path(scratch) / "store")
        mixture = Mixture((SourceConfig(path=folder, weight=1),), frames=T, seed=0)
        raw = np.load(folder / "frames-00000.npy", mmap_mode="r")
        windows = [mixture.window(number) for number in range(BATCH * BATCHES)]
        starts = [int(item) * FRAMES + first for window in windows for item, first in window.origin]
        assert all(
            np.array_equal(raw[start : start + T], window.codes.numpy())
            for start, window in zip(starts, windows, strict=True)
        )

        def ours() -> None:
            for step in range(BATCHES):
                sequences_of(mixture.windows(step, BATCH))

        def plain() -> None:
            for step in range(BATCHES):
                out = np.empty((BATCH, T * 256), dtype=np.int64)
                for slot in range(BATCH):
                    start = starts[step * BATCH + slot]
                    out[slot] = raw[start : start + T].reshape(-1)

        seconds = interleaved({"Mixture, as sequences": ours, "numpy memory map, int64 copy": plain})
    torch.set_num_threads(threads)
    print(f"Windows of {T} x 256 tokens, batches of {BATCH}, one thread, warm cache\n\n{HEADER}")
    for name, taken in seconds.items():
        print(row(name, taken, units=BATCH * BATCHES, unit="windows"))


if __name__ == "__main__":
    main()
