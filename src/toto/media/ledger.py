"""The ledger: a row for every input that was offered, with what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["ok", "short", "duplicate", "corrupt", "skipped"]


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """What became of one input.

    Attributes:
        id: the item's id.
        kind: image, video, or empty where it is neither.
        status: ok; short (too few frames or pixels); duplicate (of an item before it, by content); corrupt;
            skipped (neither image nor video).
        reason: why, in words; empty where ok.
        frames: how many frames were kept.
    """

    id: str
    kind: str
    status: Status
    reason: str = ""
    frames: int = 0


def count_by_status(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """How many rows have each status, in the order of severity, statuses that don't occur left out."""
    counts = Counter(row.status for row in rows)
    return {status: counts[status] for status in get_args(Status) if counts[status]}


def summary(counts: dict[str, int]) -> str:
    """Counts as a line: "118 ok, 1 short, 2 corrupt of 121 offered"."""
    parts = ", ".join(f"{count} {status}" for status, count in counts.items()) or "0 ok"
    return f"{parts} of {sum(counts.values())} offered"
