"""Work for the next step in a background thread, while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, final

Made = TypeVar("Made")


@final
class ReadAhead(Generic[Made]):
    """Makes the batch of the next step while the present one is used; what is made for a step is the same without it.

    One thread, started by the first `take`, and one batch ahead at most. Copies from disk and conversions leave
    Python's lock, so they run beside the model.

    Args:
        make: what is wanted for a step; an error of it is raised where the step is taken.
        end: the first step that isn't wanted any more.
    """

    def __init__(self, make: Callable[[int], Made], *, end: int):
        self._make, self._end = make, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._waiting: dict[int, Future[Made]] = {}

    def take(self, step: int) -> Made:
        """What was made for a step, and begin with the next one."""
        wanted = self._waiting.pop(step, None) or self._pool.submit(self._make, step)
        if step + 1 < self._end and step + 1 not in self._waiting:
            self._waiting = {step + 1: self._pool.submit(self._make, step + 1)}
        return wanted.result()

    def close(self) -> None:
        """Drop what is not begun and wait for what is."""
        self._pool.shutdown(wait=True, cancel_futures=True)
