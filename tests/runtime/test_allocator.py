"""Whether a process keeps the memory that it has freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from toto.runtime.allocator import keep_freed_memory

def made_anew():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(100_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ordinary = made_anew()
keep_freed_memory()
made_anew()
print(ordinary, made_anew())
"""


def faults(**environment: str) -> tuple[int, int]:
    """Page faults of 500 MB that are made and freed: as it comes, and when memory is kept."""
    words = [sys.executable, "-c", FAULTS]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | environment)
    ordinary, kept = map(int, done.stdout.split())
    return ordinary, kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_used_again():
    ordinary, kept = faults()
    assert ordinary > 1000  # pages of 4 KB or 64 KB
    assert kept < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_choice_of_the_environment_stays():
    _, kept = faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert kept > 1000
