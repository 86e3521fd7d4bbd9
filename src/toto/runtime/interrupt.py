"""Leaving on request: SIGINT and SIGTERM set a flag that long jobs look at between steps."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

SAME_SIGNAL = 2.0  # seconds
LEAVE_AFTER = 25.0  # seconds, for one of several processes; torchrun kills five later


class StopRequest:
    """Whether somebody has asked the process to stop, and with which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name, for the closing message."""
        return "" if self.signal is None else signal.Signals(self.signal).name


@contextlib.contextmanager
def stop_on_signal(*, leave_after: float | None = None) -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM sets the request; a second SIGINT interrupts at once.

    Outside the main thread, where Python allows no handlers, the request is never set.

    Args:
        leave_after: for one of several processes, which wait for each other in calls that no handler can end: where
            the request isn't even noticed for so many seconds, leave with a line. Who started them tells the signal
            to each, also after a keyboard did, so a second SIGINT within two seconds is the same one.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    noticed = -math.inf

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal noticed
        again = leave_after is None or time.monotonic() - noticed > SAME_SIGNAL
        if request and number == signal.SIGINT and again:
            raise KeyboardInterrupt
        request.signal, noticed = number, time.monotonic()

    with contextlib.ExitStack() as stack:
        if leave_after is not None:
            stack.enter_context(_leaving(request, leave_after))
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, handle))
        yield request


@contextlib.contextmanager
def _leaving(request: StopRequest, seconds: float) -> Iterator[None]:
    """Watch for signals from a thread, which hears of them while the main thread is stuck in a call."""
    heard, tell = os.pipe()
    os.set_blocking(tell, False)

    def watch() -> None:
        with os.fdopen(heard, "rb", buffering=0) as pipe:
            if not pipe.read(1)[:1].strip(b"\0"):
                return
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.2)
                if request:
                    return
        sys.stderr.write("toto: stopped while waiting for another process of the job; add --resume to continue\n")
        sys.stderr.flush()
        os._exit(1)

    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        with contextlib.suppress(OSError):
            os.write(tell, b"\0")
        os.close(tell)


def leave_with_parent() -> None:
    """In a worker process: ignore SIGINT (the parent decides) and exit as soon as the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
