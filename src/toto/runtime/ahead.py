"""Items made by a thread that runs some of them ahead of their use."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable
from typing import TypeVar

Made = TypeVar("Made")


def ahead(items: Iterable[Made], depth: int) -> Generator[Made, None, None]:
    """The same items in the same order, made by a thread; at most `depth` (1 or more) wait to be used.

    An error is raised in its place. Closing the generator stops the thread after the item that it is at, and closes
    `items` there if it is a generator.
    """
    made: deque[Made] = deque()
    error: list[BaseException] = []
    free, ready, stopped = threading.Semaphore(depth - 1), threading.Semaphore(0), threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.append(item)
                ready.release()
                free.acquire()
                if stopped.is_set():
                    break
        except BaseException as problem:
            error.append(problem)
        finally:
            if isinstance(items, Generator):
                items.close()
            ready.release()

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            ready.acquire()
            if not made:
                break
            item = made.popleft()
            free.release()
            yield item
    finally:
        stopped.set()
        free.release()
        thread.join()
    if error:
        raise error[0]
