"""What freed memory a process keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import ctypes
from toto.runtime.allocator import FreedMemory

def resident():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) / 1e3

ctypes.CDLL(None).malloc_trim
freed = FreedMemory()

def with_holes():  # nothing at the end of the heap is free
    pieces = [bytearray(100_000) for _ in range(2000)]
    return pieces[1::2]

kept = with_holes()
before = resident()
freed.give_back()
after = resident()
more = with_holes()
freed.give_back()  # only a moment later
print(before - after, resident() - after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another allocator")
def test_holes_between_what_stays_are_given_back_once_in_a_while():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=False)
    if "malloc_trim" in done.stderr:
        pytest.skip("another C library")
    given_back, taken = map(float, done.stdout.split())
    assert given_back > 80  # MB, of 100
    assert taken > 180  # of 200
