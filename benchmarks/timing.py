"""Interleaved timing: the same work by several ways in turn, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(ways: dict[str, Callable[[], object]], *, runs: int = 7, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every run of every way; the ways take turns, so a slow moment of the machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(warmup + runs):
        for name, call in ways.items():
            began = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def row(name: str, seconds: list[float], *, units: float, unit: str) -> str:
    """A table row: median rate, its range, and the median time."""
    middle = statistics.median(seconds)
    low, high = units / max(seconds), units / min(seconds)
    return f"| {name} | {units / middle:,.0f} {unit}/s | {low:,.0f} to {high:,.0f} | {1000 * middle:,.2f} ms |"


HEADER = "| | median | range | median time |\n|---|---|---|---|"
