"""Progress of long jobs: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_SECONDS = 15.0
_silent = False  # in all but the first of several processes


class Progress:
    """Counts finished units of work; use as a context manager.

    Args:
        what: what is being done ("training").
        total: how many units there are, None where nobody knows.
        unit: the unit's name in the plural ("steps").
        done: units finished before this process started, for a job that continues.
    """

    def __init__(self, what: str, *, total: int | None, unit: str, done: int = 0):
        self.what, self.total, self.unit = what, total, unit
        self.done = self._first = done
        self.note = ""
        self._began = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty() and not _silent:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[note]}", style="dim"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=total, completed=done, rate="", note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more units as finished; `note` is shown beside the numbers from now on."""
        self.done += count
        self.note = self.note if note is None else note
        if self._bar:
            rate = f"{self.rate:,.1f} {self.unit}/s"
            self._bar.update(self._task, completed=self.done, rate=rate, note=self.note)
        elif time.monotonic() - self._last_line > LINE_EVERY_SECONDS:
            self._line()

    @property
    def rate(self) -> float:
        """Units a second since this process started."""
        return (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        of = "" if self.total is None else f"/{self.total}"
        left = ""
        if self.total is not None and self.rate > 0 and self.done < self.total:
            left = f", {duration((self.total - self.done) / self.rate)} left"
        note = f"  {self.note}" if self.note else ""
        say(f"{self.what}: {self.done}{of} {self.unit}, {self.rate:,.1f}/s{left}{note}")


def say(line: str) -> None:
    """Tell the person who waits something, beside the output."""
    if not _silent:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def only_first_speaks(*, first: bool) -> Iterator[None]:
    """Within the block, a process that isn't the first of its job shows no progress."""
    global _silent
    _silent = not first
    try:
        yield
    finally:
        _silent = False


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
