"""Tokenizing against its parts: the decoder alone, the tokenizer alone, and both, by the same worker processes.

On a machine without an accelerator the parts share the cores: what can be reached at most is the harmonic sum of both
rates, which is printed beside. `--timeline FILE` draws when a worker decoded, waited and encoded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import HEADER, interleaved, row
from toto.media import sample
from toto.media.catalog import Item
from toto.media.catalogs import open_source
from toto.report.plots import INK, as_svg, new_figure
from toto.runtime.workers import Workers
from toto.tokens import encoding
from toto.tokens.encoding import Framing, encode
from toto.tokens.parallel import TASKS_A_WORKER, tasks
from toto.tokens.tokenizer import EMBEDDED, Tokenizer, load_tokenizer

FRAMING = Framing(size=128, stride=4, min_frames=1, views=1, seed=0)
_tokenizer: Tokenizer | None = None
_blind: Blind | None = None


class Blind:
    """In the tokenizer's place: takes frames, looks at none."""

    def __init__(self, tokenizer: Tokenizer):
        self.device, self._grid = tokenizer.device, tokenizer.grid(FRAMING.size, FRAMING.size)

    def encode(self, frames: Tensor) -> Tensor:
        return torch.zeros((len(frames), *self._grid), dtype=torch.int64)


def start(name: str, precision: Any) -> None:
    global _tokenizer, _blind
    torch.set_num_threads(1)
    _tokenizer = load_tokenizer(name, precision=precision)
    _blind = Blind(_tokenizer)


def work(task: tuple[str, Any]) -> int:
    """One task by one way; how many frames it had."""
    way, given = task
    assert _tokenizer is not None
    assert _blind is not None
    if way == "encode":
        frames = torch.zeros((given, FRAMING.size, FRAMING.size, 3), dtype=torch.uint8)
        for part in frames.split(encoding.FRAMES_AT_ONCE):
            _tokenizer.encode(part)
        return given
    found = encode(given, _blind if way == "decode" else _tokenizer, FRAMING)  # type: ignore[arg-type]
    return sum(len(view.codes) for each in found for view in each.views)


class Spans:
    """When what was done: (what, from, to) in seconds since the beginning."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []
        self._began, self._lock = time.perf_counter(), threading.Lock()

    def add(self, what: str, began: float) -> None:
        with self._lock:
            self.seen.append((what, began - self._began, time.perf_counter() - self._began))


def watch(todo: list[tuple[Item, ...]], tokenizer: Tokenizer) -> Spans:
    """Tokenize in this process and note when it decoded and when it encoded."""
    spans, stream_item = Spans(), encoding.stream_item

    def watched(item: Item, **options: Any) -> Iterator[Any]:
        clips = stream_item(item, **options)
        while True:
            began = time.perf_counter()
            clip = next(clips, None)
            spans.add("decode", began)
            if clip is None:
                return
            yield clip

    class Watched:
        device = tokenizer.device

        def encode(self, frames: Tensor) -> Tensor:
            began = time.perf_counter()
            codes = tokenizer.encode(frames)
            spans.add("encode", began)
            return codes

    encoding.stream_item = watched
    try:
        for task in todo:
            encode(task, Watched(), FRAMING)  # type: ignore[arg-type]
    finally:
        encoding.stream_item = stream_item
    return spans


def draw(spans: Spans, out: Path) -> None:
    """One row for the decoder's thread, one for the tokenizer's."""
    figure, axes = new_figure("One worker: the decoder runs ahead of the tokenizer", "seconds", "")
    figure.set_size_inches(7.2, 1.9)
    for place, (what, colour) in enumerate((("encode", "#1f6fd1"), ("decode", "#e0752d"))):
        bars = [(begin, end - begin) for name, begin, end in spans.seen if name == what]
        axes.broken_barh(bars, (place - 0.35, 0.7), color=colour, label=what, linewidth=0.2, edgecolor="white")
    axes.set_yticks([0, 1], ["tokenizer", "decoder"], color=INK)
    axes.grid(axis="y", visible=False)
    if out.suffix == ".svg":
        out.write_text(as_svg(figure))
    else:
        figure.savefig(out, dpi=160)


def report(source: Path, name: str, precision: str, workers: int, runs: int) -> None:
    """Print the three rates for one source."""
    catalog = open_source(str(source))
    todo = list(tasks(catalog.items, {}, least=TASKS_A_WORKER * workers))
    with Workers(start, work, (name, precision), count=workers) as pool:
        list(pool.in_order([("encode", 1)] * (2 * workers)))  # every process is there
        counts = [found for _, found in pool.in_order([("decode", task) for task in todo])]
        frames = sum(counts)
        share = [("encode", count) for count in counts]
        ways = {
            "decode alone": lambda: list(pool.in_order([("decode", task) for task in todo])),
            "encode alone": lambda: list(pool.in_order(share)),
            "tokenize": lambda: list(pool.in_order([("tokenize", task) for task in todo])),
        }
        taken = interleaved(ways, runs=runs, warmup=1)
    print(f"\n{source.name}: {len(catalog.items)} items, {frames} frames; {name}, {precision}\n\n{HEADER}")
    for way, seconds in taken.items():
        print(row(way, seconds, units=frames, unit="frames"))
    decode, alone, both = (frames / statistics.median(taken[way]) for way in ways)
    slower = min(decode, alone)
    possible = 1 / (1 / decode + 1 / alone)
    print(
        f"\ntokenizing reaches {both / slower:.0%} of its slower part"
        f" ({both / possible:.0%} of what both can reach on shared cores, {possible / slower:.0%} of the slower part)"
    )


def main() -> None:
    """Print the rates for videos and for images; draw a timeline where one is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tokenizing")
    parser.add_argument("name", nargs="*")
    parser.add_argument("--source", type=Path, action="append")
    parser.add_argument("--tokenizer", default=EMBEDDED)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--timeline", type=Path)
    options = parser.parse_args()
    print(f"{options.workers} worker processes of one thread, stride {FRAMING.stride}, {FRAMING.size} px")
    scenes = sample.scenes("heldout")[0].parent
    for source in options.source or [scenes, sample.photographs("train")[0].parent]:
        report(source, options.tokenizer, options.precision, options.workers, options.runs)
    if options.timeline:
        torch.set_num_threads(1)
        items = open_source(str((options.source or [scenes])[0])).items
        tokenizer = load_tokenizer(options.tokenizer, precision=options.precision)
        draw(watch(list(tasks(items[:12], {})), tokenizer), options.timeline)
        print(f"timeline: {options.timeline}")
