"""Worker processes that may die: each task ends with its result, or with how its worker was lost.

A crash takes down the worker that met it and nothing else; another one takes its place. So does a task that runs out
of time. A task whose worker was killed from outside is done again. Results come in the order of the tasks, whatever the
number of workers.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from toto.runtime.errors import TotoError
from toto.runtime.interrupt import leave_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 4  # tasks in hand for each worker: so many results may wait for an earlier one
LEAVING = 5.0  # seconds that a process may take to be gone
TRIALS = 3  # for a task whose worker somebody killed, which says nothing about the task


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A task whose worker crashed, or was stopped because it took too long."""

    reason: str


def worker_count(asked: int | None) -> int:
    """How many processes are meant: None is one for each core."""
    return (os.cpu_count() or 1) if asked is None else asked


class KilledError(TotoError):
    """A worker process was killed from outside (SIGKILL), as the system does when memory is short."""


class StoppedError(TotoError):
    """A worker process was asked to stop (SIGTERM), as all are where somebody stops a whole group of processes."""


@final
class Workers(Generic[Task, Result]):
    """A pool of spawned processes; use as a context manager.

    Args:
        start: called once in each process, with `arguments`.
        work: turns a task into a result, in a process; an exception of it is raised where the result is awaited.
        arguments: of `start`; they are pickled, as tasks and results are, and functions have to lie in modules.
        count: processes.
        what: what a task's worker is called where it is lost ("the decoder").
    """

    def __init__(
        self,
        start: Callable[..., None],
        work: Callable[[Task], Result],
        arguments: tuple[Any, ...] = (),
        *,
        count: int,
        what: str = "the worker",
    ):
        self._life = start, work, arguments
        self._count, self._what = count, what
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._busy: set[_Worker] = set()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="toto-worker")
        self._closed = False

    def __enter__(self) -> Workers[Task, Result]:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        """Stop every process, also those at work."""
        self._closed = True
        for worker in list(self._busy):
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def in_order(
        self,
        tasks: Iterable[Task],
        *,
        limit: Callable[[Task], float | None] = lambda _: None,
        known: Callable[[Task], Result | None] = lambda _: None,
    ) -> Iterator[tuple[Task, Result | Lost]]:
        """Each task with its result, in the order of the tasks.

        Args:
            tasks: taken a few at a time.
            limit: seconds that a task may take, None for any.
            known: a result that needs no worker, or None.
        """
        waiting: deque[tuple[Task, Result | Future[Result | Lost]]] = deque()
        for task in tasks:
            ready = known(task)
            entry = self._threads.submit(self._run, task, limit(task)) if ready is None else ready
            waiting.append((task, entry))
            while len(waiting) > AHEAD * self._count:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())

    def _run(self, task: Task, limit: float | None) -> Result | Lost:
        for trial in range(1, TRIALS + 1):
            try:
                return self._try(task, limit)
            except KilledError:
                if self._closed or trial == TRIALS:
                    raise
        raise AssertionError

    def _try(self, task: Task, limit: float | None) -> Result | Lost:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(*self._life)
        self._busy.add(worker)
        try:
            if self._closed:
                return Lost(reason="stopped")
            found = worker.run(task, limit, self._what)
        except BaseException:
            worker.stop()
            raise
        finally:
            self._busy.discard(worker)
        if worker.alive:
            self._idle.put(worker)
        return found  # type: ignore[no-any-return]


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, start: Callable[..., None], work: Callable[[Any], Any], arguments: tuple[Any, ...]):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, start, work, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False
        self.alive = True

    def run(self, task: Any, limit: float | None, what: str) -> Any:
        """The task's result, or `Lost`."""
        if not self._ready:
            found = self._receive(None, "a worker process")
            if isinstance(found, Lost):
                raise TotoError(f"{found.reason} as it started", fix="run the same command with --debug --workers 0")
            self._ready = True
        try:
            self._pipe.send(task)
        except OSError:
            return self._lost(what)
        return self._receive(limit, what)

    def kill(self) -> None:
        """End the process while another thread waits for it, which then cleans up."""
        self._process.kill()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.alive = False
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, limit: float | None, what: str) -> Any:
        until = None if limit is None else time.monotonic() + limit
        if not connection.wait([self._pipe, self._process.sentinel], limit):
            self.stop()
            return Lost(reason=f"took longer than {limit:g} s")
        try:
            left = None if until is None else max(0.0, until - time.monotonic()) + 1.0
            if not self._pipe.poll(left if self._process.is_alive() else 0):
                return self._lost(what)
            kind, found = self._pipe.recv()
        except (EOFError, OSError):
            return self._lost(what)
        if kind == "error":
            raise found
        return found

    def _lost(self, what: str) -> Lost:
        """How the process ended.

        Raises:
            KilledError: somebody killed it, which says nothing about its task.
            StoppedError: somebody asked it to stop.
        """
        self._process.join(LEAVING)
        code = self._process.exitcode or 0
        self.stop()
        again = "run the same command again to continue"
        if -code == signal.SIGKILL:
            raise KilledError(
                f"worker processes are killed (SIGKILL, {TRIALS} times at the same work), as happens when memory is"
                " short",
                fix=f"{again}, with fewer --workers",
            )
        if -code == signal.SIGTERM:
            raise StoppedError("a worker process was stopped (SIGTERM)", fix=again)
        how = _signal_name(-code) if code < 0 else f"exit code {code}"
        return Lost(reason=f"{what} crashed ({how})")


def _serve(
    pipe: Connection, start: Callable[..., None], work: Callable[[Any], Any], arguments: tuple[Any, ...]
) -> None:
    """The life of a worker process: start, then task after task until the pipe closes."""
    leave_with_parent()
    try:
        start(*arguments)
        pipe.send(("ready", None))
    except Exception as error:
        pipe.send(("error", _portable(error)))
        return
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = "result", work(task)
        except Exception as error:
            answer = "error", _portable(error)
        pipe.send(answer)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where its kind may not survive pickling."""
    if isinstance(error, TotoError | OSError | MemoryError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _finished(entry: tuple[Task, Result | Future[Result | Lost]]) -> tuple[Task, Result | Lost]:
    task, found = entry
    return task, found.result() if isinstance(found, Future) else found


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
