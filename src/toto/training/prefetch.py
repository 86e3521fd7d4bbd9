"""Work for the next steps in background threads, while this one computes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar, final

Made = TypeVar("Made")

WORTH_HANDING_OVER = 0.001  # seconds of work: waking another thread takes a tenth of it
MOST_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """An error that waits for its step."""

    error: Exception


@final
class ReadAhead(Generic[Made]):
    """Makes the batches of the next steps while the present one is used; each is the same without it.

    Threads, not processes: copies from mapped files and conversions leave Python's lock, so they run beside the model
    and beside each other, and a batch needn't be handed over.

    Args:
        make: what is wanted for a step; called by several threads at once, and an error of it is raised where the step
            is taken.
        end: the first step that isn't wanted any more.
        workers: threads, started by the first `take`, each of them a batch ahead, or a few where a batch takes less
            than a millisecond. 0 makes a batch when it is taken.
    """

    def __init__(self, make: Callable[[int], Made], *, end: int, workers: int = 1):
        self._make, self._end, self._workers = make, end, workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead") if workers else None
        self._waiting: deque[tuple[range, Future[list[Made | _Failed]]]] = deque()
        self._next, self._together = 0, 1

    def take(self, step: int) -> Made:
        """What was made for a step, and begin with the next ones."""
        if self._pool is None:
            return self._make(step)
        while self._waiting and step not in self._waiting[0][0]:
            self._waiting.popleft()[1].cancel()
        if not self._waiting:
            self._next = step
        while len(self._waiting) <= self._workers and (self._next < self._end or not self._waiting):
            steps = range(self._next, max(self._next + 1, min(self._next + self._together, self._end)))
            self._waiting.append((steps, self._pool.submit(self._make_all, steps)))
            self._next = steps.stop
        steps, found = self._waiting[0]
        made = found.result()[step - steps.start]
        if step == steps[-1]:
            self._waiting.popleft()
        if isinstance(made, _Failed):
            raise made.error
        return made

    def close(self) -> None:
        """Drop what is not begun and wait for what is."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _make_all(self, steps: range) -> list[Made | _Failed]:
        made: list[Made | _Failed] = []
        began = time.perf_counter()
        for step in steps:
            try:
                made.append(self._make(step))
            except Exception as error:
                made.append(_Failed(error=error))
        seconds = (time.perf_counter() - began) / len(steps)
        self._together = max(1, min(MOST_TOGETHER, int(WORTH_HANDING_OVER / max(seconds, 1e-9))))
        return made
