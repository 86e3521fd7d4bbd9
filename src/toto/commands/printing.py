"""Lines that several verbs print."""

from __future__ import annotations

from collections.abc import Sequence

CLASSES_SHOWN = 8


def classes_line(classes: Sequence[str]) -> str:
    """How many classes there are, and the first of them in their order.

    >>> classes_line(["walk", "run"])
    '2 classes, in their order: walk, run'
    """
    more = f", and {len(classes) - CLASSES_SHOWN} more" if len(classes) > CLASSES_SHOWN else ""
    return f"{len(classes)} classes, in their order: {', '.join(classes[:CLASSES_SHOWN])}{more}"
