"""How this process takes memory from the system."""

from __future__ import annotations

import ctypes
import os
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # of glibc's malloc.h
M_MMAP_MAX: Final = -4
CHOSEN_BY: Final = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let the C heap (glibc's) keep what is freed for what is made next, instead of giving it back at once.

    A training step on a processor makes and frees gigabytes. By itself glibc takes every tensor of 32 MB and more anew
    from the system, which zeroes it page by page. A choice that the environment has made, and other C libraries, are
    left alone.
    """
    if any(name in os.environ for name in CHOSEN_BY):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
