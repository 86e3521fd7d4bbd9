"""The same pool of workers on the machines of a Ray cluster.

Every actor keeps a worker process of its own (`toto.runtime.workers`), so a crash or a task that runs out of time ends
as it does on one machine; what takes the actor or its machine down makes Ray start it elsewhere and do its tasks again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar, final

from toto.runtime.errors import ConfigError, TotoError
from toto.runtime.workers import TRIALS, Lost, Workers

Task = TypeVar("Task")
Result = TypeVar("Result")
CORES_AN_ACTOR = 0.5  # whole ones starve Ray's own tasks on small machines
IN_HAND = 2  # tasks that an actor has, so that it finds the next one when it has done one
AHEAD = 4  # tasks in hand for each actor, with those whose results wait for an earlier one
STARTING = 300.0  # seconds that a cluster may take to start the first actor


@final
class RayWorkers(Generic[Task, Result]):
    """A pool of actors; use as a context manager. See `Workers` for `start`, `work`, `arguments` and `what`.

    Args:
        start: as there; it and `work` have to be importable on every machine of the cluster.
        work: as there.
        arguments: as there.
        address: of the cluster: HOST:PORT, ray://HOST:PORT, "auto", or "local" for one on this machine alone.
        count: actors; None is one for each core of the cluster.
        what: as there.
        gpu: give the actors the cluster's GPUs, in equal shares.

    Raises:
        ConfigError: there is no cluster at the address, it has no room for an actor, or ray is not installed.
    """

    def __init__(
        self,
        start: Callable[..., None],
        work: Callable[[Task], Result],
        arguments: tuple[Any, ...] = (),
        *,
        address: str,
        count: int | None,
        what: str = "the worker",
        gpu: bool = False,
    ):
        self._life = start, work, arguments, what
        self._address, self._count, self._gpu = address, count, gpu
        self._actors: list[Any] = []
        self._load: list[int] = []
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> RayWorkers[Task, Result]:
        ray = _import_ray()
        if not ray.is_initialized():
            try:
                ray.init(address=self._address, log_to_driver=False, configure_logging=False, include_dashboard=False)
            except (ConnectionError, ValueError, OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise ConfigError(
                    f"no Ray cluster answers ({reason})",
                    where=f"--ray {self._address}",
                    fix="start one with `ray start --head`, or use --ray local",
                ) from None
            self._closing.callback(ray.shutdown)
        resources = ray.cluster_resources()
        self._count = self._count or max(1, int(resources.get("CPU", 1)))
        share = resources.get("GPU", 0.0) / self._count if self._gpu else 0.0
        options = {"num_cpus": CORES_AN_ACTOR, "num_gpus": share, "max_restarts": -1, "max_task_retries": TRIALS}
        kind = ray.remote(**options)(_Actor)
        self._actors = [kind.remote(*self._life) for _ in range(self._count)]
        self._load = [0] * self._count
        if not ray.wait([actor.begin.remote() for actor in self._actors], num_returns=1, timeout=STARTING)[0]:
            self._closing.close()
            raise ConfigError(
                f"has no room for a worker within {STARTING:g} s", where=f"--ray {self._address}", fix="free some cores"
            )
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        """Stop every actor, also those at work."""
        ray = _import_ray()
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._closing.close()

    def in_order(
        self,
        tasks: Iterable[Task],
        *,
        limit: Callable[[Task], float | None] = lambda _: None,
        known: Callable[[Task], Result | None] = lambda _: None,
    ) -> Iterator[tuple[Task, Result | Lost]]:
        """Each task with its result, in the order of the tasks; see `Workers.in_order`."""
        waiting: deque[tuple[Task, Any, Result | None]] = deque()
        running: dict[Any, int] = {}
        for task in tasks:
            ready = known(task)
            waiting.append((task, self._submit(task, limit(task), running) if ready is None else None, ready))
            while len(waiting) > AHEAD * len(self._actors):
                yield self._take(waiting.popleft(), running)
        while waiting:
            yield self._take(waiting.popleft(), running)

    def _submit(self, task: Task, limit: float | None, running: dict[Any, int]) -> Any:
        """Give the task to the actor with the fewest; where all have enough, wait until one is done."""
        ray = _import_ray()
        while min(self._load) >= IN_HAND and running:
            for done in ray.wait(list(running), num_returns=1)[0]:
                self._load[running.pop(done)] -= 1
        number = self._load.index(min(self._load))
        reference = self._actors[number].run.remote(task, limit)
        running[reference] = number
        self._load[number] += 1
        return reference

    def _take(self, entry: tuple[Task, Any, Result | None], running: dict[Any, int]) -> tuple[Task, Result | Lost]:
        task, reference, ready = entry
        if reference is None:
            assert ready is not None
            return task, ready
        ray = _import_ray()
        try:
            kind, found = ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise TotoError(
                f"the Ray cluster lost a worker for good ({reason})",
                where=f"--ray {self._address}",
                fix="run the same command again to continue",
            ) from None
        finally:
            if reference in running:
                self._load[running.pop(reference)] -= 1
        if kind == "error":
            raise found
        return task, found


class _Actor:
    """Lives on a machine of the cluster, and keeps a worker process there."""

    def __init__(self, start: Callable[..., None], work: Callable[[Any], Any], arguments: tuple[Any, ...], what: str):
        self._workers: Workers[Any, Any] = Workers(start, work, arguments, count=1, what=what)

    def begin(self) -> None:
        """Answers once the actor is there."""

    def run(self, task: Any, limit: float | None) -> tuple[str, Any]:
        """The task's result, or what was raised."""
        try:
            [(_, found)] = self._workers.in_order([task], limit=lambda _: limit)
        except Exception as error:
            return "error", error
        return "result", found


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ConfigError(
            "needs the package ray, which is not installed", where="--ray", fix="pip install 'toto-video[ray]'"
        ) from None
    return ray
