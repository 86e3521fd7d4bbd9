"""How this process takes memory from the system."""

from __future__ import annotations

import os


def prefer_huge_pages() -> None:
    """Let torch take large tensors from the system in pages of 2 MB, where the system has them (Linux on a processor).

    A training step makes and frees gigabytes, and the system gives them page by page, zeroed: with pages of 4 KB that
    is a million faults in a few steps. It must be called before the first tensor is made, and leaves a choice alone
    that the environment has made (`THP_MEM_ALLOC_ENABLE`).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
