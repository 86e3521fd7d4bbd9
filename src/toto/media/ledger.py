"""The ledger: a row for every input that was offered, with what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["ok", "short", "duplicate", "corrupt", "skipped"]
ROWS_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """What became of one input.

    Attributes:
        id: the item's id.
        kind: image, video, or empty where it is neither.
        status: ok; short (too few frames or pixels); duplicate (of an item before it, by content or by name);
            corrupt (or missing); skipped (no medium, refused, or left out on purpose).
        reason: why, in words; empty where ok.
        frames: how many frames were kept.
        split: train, val, ... where the source names one for an input that became no item.
    """

    id: str
    kind: str
    status: Status
    reason: str = ""
    frames: int = 0
    split: str | None = None


def count_by_status(rows: Iterable[LedgerRow]) -> dict[str, int]:
    """How many rows have each status, in the order of severity, statuses that don't occur left out."""
    return in_order_of_severity(Counter(row.status for row in rows))


def in_order_of_severity(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts by status in one order, those of 0 left out."""
    return {status: counts[status] for status in get_args(Status) if counts.get(status)}


def summary(counts: Mapping[str, int], stored: object = None) -> str:
    """The line at the end of every verb that reads inputs, with the place where their rows are stored.

    >>> summary({"ok": 117, "short": 2, "corrupt": 1}, "shards/ledger.parquet")
    'offered 120: 117 ok, 2 short, 1 corrupt (ledger: shards/ledger.parquet)'
    """
    parts = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count) or "0 ok"
    return f"offered {sum(counts.values()):,}: {parts}" + ("" if stored is None else f" (ledger: {stored})")


def unused(rows: Iterable[LedgerRow], *, most: int = ROWS_SHOWN, rest_in: object = None) -> list[str]:
    """A line for each row that is neither ok nor skipped, at most so many, and how many more there are."""
    named = [row for row in rows if row.status not in ("ok", "skipped")]
    lines = [f"  {row.status:<10}{row.id}: {row.reason}" for row in named[:most]]
    more = "" if rest_in is None else f" in {rest_in}"
    return lines + ([f"  and {len(named) - most:,} more{more}"] if len(named) > most else [])
