"""Shuffled reading of windows into batches, against a plain numpy memory-map loop that copies the same windows.

And the start of training on a store of 100 million frames, in a process of its own:

    python -m benchmarks reading
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import HEADER, interleaved, row
from toto.media.decode import Kind
from toto.tokens.passport import Passport
from toto.tokens.shards import StoredItem, finish_store, shard_name, write_ledger, write_shard
from toto.training.mixture import Mixture
from toto.training.prefetch import ReadAhead
from toto.training.source import SourceConfig

ITEMS, FRAMES, T, GRID, BATCH, BATCHES = 200, 1000, 16, (16, 16), 64, 160
IMAGES = 50_000
LARGE_ITEMS, LARGE_FRAMES, LARGE_FILES = 400_000, 250, 1000
PASSPORT = Passport(
    kind="vqvae", weights_sha256="0" * 64, preprocessing="", vocab_size=8192, frame_size=(128, 128), grid=GRID
)
START = """
import json, re, sys, time
from toto.training.mixture import Mixture
from toto.training.source import SourceConfig
def memory():
    peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
    own = re.search(r"Anonymous:\\s*(\\d+)", open("/proc/self/smaps_rollup").read())[1]
    return int(peak) / 1024, int(own) / 1024
before, began = memory(), time.perf_counter()
mixture = Mixture((SourceConfig(path=sys.argv[1], weight=1),), frames=16, seed=0)
opened = time.perf_counter() - began
mixture.batch(0, 64).sequences()
first = time.perf_counter() - began
print(json.dumps([opened, first, *before, *memory()]))
"""


def make_store(folder: Path) -> Path:
    """A store of 200 items of 1,000 frames at 16 x 16 in one file of 102 MB."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, 8192, (FRAMES, *GRID), dtype=np.uint16) for _ in range(ITEMS)]
    folder.mkdir()
    _finish(folder, [write_shard(folder, 0, codes, GRID)], items=ITEMS, frames=FRAMES)
    return folder


def make_images(folder: Path) -> Path:
    """A store of 50,000 images at 16 x 16."""
    folder.mkdir()
    codes = np.random.default_rng(1).integers(0, 8192, (IMAGES, *GRID), dtype=np.uint16)
    _finish(folder, [write_shard(folder, 0, [codes], GRID)], items=IMAGES, frames=1, kind="image")
    return folder


def make_large_store(folder: Path) -> Path:
    """A store of 100 million frames, 51 GB, in sparse files that take nearly no disk; its checksums are zeros."""
    folder.mkdir()
    shards = []
    frames = LARGE_ITEMS * LARGE_FRAMES // LARGE_FILES
    for number in range(LARGE_FILES):
        path = folder / shard_name(number)
        with path.open("wb") as handle:
            header = {"descr": "<u2", "fortran_order": False, "shape": (frames, *GRID)}
            np.lib.format.write_array_header_1_0(handle, header)
            handle.truncate(handle.tell() + frames * 2 * GRID[0] * GRID[1])
        shards.append({"file": path.name, "frames": frames, "sha256": "0" * 64})
    _finish(folder, shards, items=LARGE_ITEMS, frames=LARGE_FRAMES)
    return folder


def _finish(folder: Path, shards: list[dict[str, object]], *, items: int, frames: int, kind: Kind = "video") -> None:
    rows = [
        StoredItem(
            id=f"{n:09}.mp4", kind=kind, label=None, first_frame=n * frames, frame_count=frames, fps=30, stride=4
        )
        for n in range(items)
    ]
    write_ledger(folder, [])
    finish_store(folder, passport=PASSPORT, stride=4, shards=shards, items=rows, counts={}, job={})


def drop_from_cache(path: Path) -> None:
    """Ask the system to forget a file's pages; nobody may have it mapped."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def papers_mixture(videos: Path, images: Path) -> dict[str, list[float]]:
    """Three stores of videos and one of images in the paper's ratios, against loops over the same frames."""
    sources = (
        SourceConfig(path=images, weight=0.2, modality="image"),
        *(SourceConfig(path=videos, weight=weight) for weight in (0.1, 0.1, 0.6)),
    )
    mixture = Mixture(sources, frames=T, seed=0)
    raw = [np.load(source.config.path / shard_name(0), mmap_mode="r") for source in mixture.sources]
    runs = []
    for step in range(BATCHES):
        batch = mixture.batch(step, BATCH)
        firsts = [mixture.sources[n].first_frames(batch.draw[[slot]])[0] for slot, n in enumerate(batch.source)]
        runs.append(list(zip(batch.source.tolist(), firsts, strict=True)))

    def plain(step: int, out: np.ndarray) -> np.ndarray:
        for slot, (source, firsts) in enumerate(runs[step]):
            for place, first in enumerate(firsts):
                count = T // len(firsts)
                out[slot, place * count : (place + 1) * count] = raw[source][first : first + count]
        return out

    out = np.empty((BATCH, T, *GRID), np.uint16)
    assert all(np.array_equal(plain(step, out), mixture.batch(step, BATCH).codes) for step in range(BATCHES))

    def by_numpy() -> None:
        for step in range(BATCHES):
            plain(step, out)

    def ours() -> None:
        for step in range(BATCHES):
            mixture.batch(step, BATCH)

    return interleaved({"numpy memory maps, uint16": by_numpy, "`Mixture.batch`, uint16": ours})


class Ways:
    """The same batches by several ways."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / shard_name(0)
        mixture = self.mixture()
        source = mixture.sources[0]
        self.starts = [source.first_frames(mixture.batch(step, BATCH).draw)[:, 0] for step in range(BATCHES)]

    def mixture(self) -> Mixture:
        return Mixture((SourceConfig(path=self.folder, weight=1),), frames=T, seed=0)

    def plain(self, raw: np.ndarray, dtype: type[np.generic]) -> Iterator[np.ndarray]:
        """The loop that everybody would write; `starts` are known to it."""
        out = np.empty((BATCH, T, *GRID), dtype)
        for starts in self.starts:
            for slot, start in enumerate(starts):
                out[slot] = raw[start : start + T]
            yield out

    def ours(self, mixture: Mixture, workers: int, *, sequences: bool = False) -> Iterator[object]:
        """The batches as training takes them."""

        def make(step: int) -> object:
            batch = mixture.batch(step, BATCH)
            return batch.sequences() if sequences else batch

        with closing(ReadAhead(make, end=BATCHES, workers=workers)) as ahead:
            for step in range(BATCHES):
                yield ahead.take(step)

    def raw(self) -> np.ndarray:
        return np.load(self.file, mmap_mode="r")

    def check(self) -> None:
        """Compare every batch of all ways."""
        mixture = self.mixture()
        for workers in (0, 1, 2):
            made = self.ours(mixture, workers, sequences=True)
            for step, (sequences, expected) in enumerate(zip(made, self.plain(self.raw(), np.uint16), strict=True)):
                assert isinstance(sequences, torch.Tensor)
                batch = mixture.batch(step, BATCH)
                assert np.array_equal(batch.codes, expected)
                codes = expected.reshape(BATCH, -1).astype(np.int64)
                assert np.array_equal(sequences[:, 1:-1].numpy(), codes + 4)
                assert sequences.equal(batch.sequences())


def warm(ways: Ways) -> dict[str, list[float]]:
    """Everything is in memory and mapped; batches are used as fast as they come."""
    mixture, raw = ways.mixture(), ways.raw()

    def through(batches: Iterator[object]) -> None:
        for _ in batches:
            pass

    return interleaved(
        {
            "numpy memory map, uint16": lambda: through(ways.plain(raw, np.uint16)),
            "`Mixture.batch`, uint16, 0 workers": lambda: through(ways.ours(mixture, 0)),
            "`Mixture.batch`, uint16, 2 workers": lambda: through(ways.ours(mixture, 2)),
            "numpy memory map, int64": lambda: through(ways.plain(raw, np.int64)),
            "`Mixture.batch`, as sequences of ids, 0 workers": lambda: through(ways.ours(mixture, 0, sequences=True)),
            "`Mixture.batch`, as sequences of ids, 2 workers": lambda: through(ways.ours(mixture, 2, sequences=True)),
        }
    )


def cold(ways: Ways) -> dict[str, list[float]]:
    """Nothing is in the system's cache; stores are opened anew."""

    def plain() -> None:
        for _ in ways.plain(ways.raw(), np.uint16):
            pass

    def ours(workers: int) -> None:
        for _ in ways.ours(ways.mixture(), workers):
            pass

    named: dict[str, Callable[[], None]] = {
        "numpy memory map, uint16": plain,
        "`Mixture.batch`, uint16, 0 workers": lambda: ours(0),
        "`Mixture.batch`, uint16, 2 workers": lambda: ours(2),
    }
    return _cold(named, ways)


def beside_work(ways: Ways) -> dict[str, list[float]]:
    """Reading from a cold cache for a consumer that waits 4 ms a batch, as for a GPU, with and without the thread."""

    def compute() -> None:
        time.sleep(0.004)

    def only() -> None:
        for _ in range(BATCHES):
            compute()

    def in_turn() -> None:
        mixture = ways.mixture()
        for step in range(BATCHES):
            mixture.batch(step, BATCH).sequences()
            compute()

    def ahead() -> None:
        mixture = ways.mixture()
        with closing(ReadAhead(lambda step: mixture.batch(step, BATCH).sequences(), end=BATCHES)) as reader:
            for step in range(BATCHES):
                reader.take(step)
                compute()

    return _cold({"the steps alone": only, "reading between the steps": in_turn, "reading ahead": ahead}, ways)


def _cold(named: dict[str, Callable[[], None]], ways: Ways) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(7):
        for name, call in named.items():
            drop_from_cache(ways.file)
            seconds[name] += interleaved({name: call}, runs=1, warmup=0)[name]
    return seconds


def main() -> None:
    """Print windows a second of all ways, whose contents are compared first, and what a large store costs to open."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_store(Path(scratch) / "store")
        ways = Ways(folder)
        ways.check()
        size = sum(path.stat().st_size for path in folder.iterdir()) / (ITEMS * FRAMES * GRID[0] * GRID[1])
        for name, measure in (
            ("warm cache", warm),
            ("cold cache", cold),
            ("cold cache, steps of 4 ms elsewhere", beside_work),
        ):
            if measure is not warm and not hasattr(os, "posix_fadvise"):
                continue
            print(f"Windows of {T} x 256 tokens, batches of {BATCH}, {name}\n\n{HEADER}")
            for way, taken in measure(ways).items():
                print(row(way, taken, units=BATCH * BATCHES, unit="windows"), flush=True)
            print()
        print(f"The paper's mixture: a fifth of the windows are 16 images, warm cache\n\n{HEADER}")
        for way, taken in papers_mixture(folder, make_images(Path(scratch) / "images")).items():
            print(row(way, taken, units=BATCH * BATCHES, unit="windows"), flush=True)
        print(f"\n{size:.3f} bytes a token on disk, tables and manifest included")
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_large_store(Path(scratch) / "store")
        found = [_start(folder) for _ in range(5)]
    opened, first, before, own_before, peak, own = sorted(found, key=lambda each: each[1])[len(found) // 2]
    print(
        f"100 million frames, {LARGE_ITEMS:,} items, {LARGE_FILES:,} files: opened in {opened:.2f} s, the first batch "
        f"after {first:.2f} s\nMemory at its peak: {peak - before:.0f} MB above the {before:.0f} MB of the imports; of "
        f"what is in memory, {own - own_before:.0f} MB of {own:.0f} MB are no mapped files"
    )


def _start(folder: Path) -> list[float]:
    words = [sys.executable, "-c", START, str(folder)]
    found: list[float] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return found


if __name__ == "__main__":
    main()
