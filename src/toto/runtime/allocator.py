"""How this process takes memory from the system."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

GIVEN_BACK_EVERY = 10.0  # seconds


def prefer_huge_pages() -> None:
    """Let torch take large tensors from the system in pages of 2 MB, where the system has them (Linux on a processor).

    A training step makes and frees gigabytes, and the system gives them page by page, zeroed: with pages of 4 KB that
    is a million faults in a few steps. It must be called before the first tensor is made, and leaves a choice alone
    that the environment has made (`THP_MEM_ALLOC_ENABLE`).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class FreedMemory:
    """What tensors on a processor leave behind: the C heap (glibc's) keeps it as holes between tensors that stay.

    A step's activations lie between gradients, moments and each other. Holes that don't fit the next step's tensors
    add a fifth to a training process. Elsewhere nothing is done.
    """

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None = None
        try:
            self._trim = ctypes.CDLL(None).malloc_trim
        except (AttributeError, OSError, TypeError):  # another C library
            return
        self._next = time.monotonic()

    def give_back(self) -> None:
        """Between steps: give it back to the system, if that wasn't done a moment ago; 30 ms for a gigabyte."""
        if self._trim is not None and time.monotonic() >= self._next:
            self._trim(0)
            self._next = time.monotonic() + GIVEN_BACK_EVERY
