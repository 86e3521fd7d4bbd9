"""Items to their codes, in order: in this process, in worker processes, or on the machines of a Ray cluster.

A worker gets several items at once, so that it can decode the next one while it encodes the one before. Where it
doesn't survive them, they are tried again one by one, and the one that kills it is lost alone. So the results depend
neither on the kind of workers nor on their number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from toto.media.catalog import Item, units
from toto.runtime.device import one_thread, pick_device
from toto.runtime.errors import MediaError
from toto.runtime.files import writing
from toto.runtime.network import patience
from toto.runtime.ray_workers import RayWorkers
from toto.runtime.remote import RemotePath
from toto.runtime.workers import Lost, Workers, worker_count
from toto.tokens.encoding import Encoded, EncodedView, Framing, Task, encode, failed, waiting_file
from toto.tokens.tokenizer import Arithmetic, Tokenizer, load_tokenizer

IMAGES_AT_ONCE, VIDEOS_AT_ONCE, BYTES_AT_ONCE = 64, 4, 16_000_000  # that a worker gets: so many, or videos of so much
TASKS_A_WORKER = 4  # at least, in a shard


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every worker has to know.

    Attributes:
        tokenizer: its name or folder.
        device: where it runs.
        precision: of its matrix products.
        framing: how items become frames.
        waiting: the folder where frames wait, where they are kept too.
        time_limit: seconds that an item may take.
    """

    tokenizer: str
    device: str
    precision: Arithmetic
    framing: Framing
    waiting: Path | None
    time_limit: float

    def limit(self, task: Task) -> float:
        """Seconds for a task, and to fetch it: its items share those of one; should that not do, each gets its own."""
        fetching = patience(sum(item.size for item in task)) if isinstance(task[0].path, RemotePath) else 0.0
        return self.time_limit * max(len(unit) for unit in units(task)) + 2 * fetching


def tasks(shard: Sequence[Item], duplicates: Mapping[str, str], *, least: int = 1) -> Iterator[Task]:
    """What a worker gets at once: images, videos, windows of one video; a duplicate, which nobody reads, alone.

    Args:
        shard: the items.
        duplicates: an item's id -> that of the item whose bytes it has.
        least: about so many tasks are made at least, so that all workers have some; single units are not cut.
    """
    cut = units(shard)
    shares = [_share(unit[0]) for unit in cut]
    most = min(1.0, sum(shares) / least)
    held: list[Item] = []
    filled = 0.0
    for unit, share in zip(cut, shares, strict=True):
        known = unit[0].id in duplicates
        if held and (known or filled + share > most):
            yield tuple(held)
            held, filled = [], 0.0
        if known:
            yield unit
        else:
            held += unit
            filled += share
    if held:
        yield tuple(held)


def _share(item: Item) -> float:
    """How much of a task a unit takes that begins with this item."""
    if item.kind == "image":
        return 1 / IMAGES_AT_ONCE
    return max(1 / VIDEOS_AT_ONCE, item.size / BYTES_AT_ONCE)


def encode_all(
    todo: Iterable[Task],
    duplicates: Mapping[str, str],
    work: Work,
    *,
    tokenizer: Tokenizer,
    workers: int | None,
    ray: str | None = None,
) -> Generator[Encoded, None, None]:
    """Results of all items of the tasks, in their order; duplicates are not read.

    Args:
        todo: the tasks.
        duplicates: an item's id -> that of the item whose bytes it has.
        work: what to do.
        tokenizer: for the work without workers.
        workers: how many; 0 works in this process, None takes all cores.
        ray: the address of a cluster whose machines work.
    """

    def known(task: Task) -> tuple[Encoded, ...] | None:
        if task[0].id not in duplicates:
            return None
        reason = f"the same bytes as {duplicates[task[0].id]}"
        return tuple(Encoded(item=item, status="duplicate", reason=reason) for item in task)

    if ray is None and workers == 0:
        with one_thread():
            for task in todo:
                yield from known(task) or encode(task, tokenizer, work.framing, waiting=work.waiting)
        return
    pool: Workers[Task, tuple[Encoded, ...]] | RayWorkers[Task, tuple[Encoded, ...]]
    if ray is None:
        pool = Workers(_start, _encode, (work,), count=worker_count(workers), what="the decoder")
    else:
        far = _start_far, _encode_far, (replace(work, waiting=None), work.waiting is not None)
        pool = RayWorkers(*far, address=ray, count=workers, what="the decoder", gpu=work.device in ("auto", "cuda"))
    with pool:
        for task, found in pool.in_order(todo, limit=work.limit, known=known):
            if isinstance(found, Lost) and len(alone := units(task)) > 1:
                for unit, one in pool.in_order(alone, limit=work.limit):
                    yield from _settled(unit, one, work)
            else:
                yield from _settled(task, found, work)


def _settled(task: Task, found: tuple[Encoded, ...] | Lost, work: Work) -> tuple[Encoded, ...]:
    """The items of a finished task; frames that came with them wait in files from now on."""
    if isinstance(found, Lost):
        return tuple(
            failed(item, MediaError(found.reason, where=item.id), work.framing, waiting=work.waiting) for item in task
        )
    if work.waiting is None:
        return found
    settled = []
    for each in found:
        views = []
        for number, view in enumerate(each.views):
            place = waiting_file(work.waiting, each.item, number)
            if isinstance(view.pixels, np.ndarray):
                with writing(place):
                    view.pixels.tofile(place)
            views.append(replace(view, pixels=place))
        settled.append(replace(each, views=tuple(views)))
    return tuple(settled)


_worker: tuple[Tokenizer, Work, bool] | None = None


def _start(work: Work) -> None:
    """Begin the life of a worker on this machine: frames wait where the run wants them."""
    _start_far(work, pixels=False)


def _start_far(work: Work, pixels: bool) -> None:
    """Begin the life of a worker anywhere; with `pixels`, frames are sent back with their codes."""
    global _worker
    torch.set_num_threads(1)
    device = pick_device(work.device)
    _worker = load_tokenizer(work.tokenizer, device=device, precision=work.precision), work, pixels


def _encode(task: Task) -> tuple[Encoded, ...]:
    assert _worker is not None
    tokenizer, work, _ = _worker
    return encode(task, tokenizer, work.framing, waiting=work.waiting)


def _encode_far(task: Task) -> tuple[Encoded, ...]:
    assert _worker is not None
    tokenizer, work, pixels = _worker
    if not pixels:
        return encode(task, tokenizer, work.framing)
    with tempfile.TemporaryDirectory(prefix="toto-") as waiting:
        found = encode(task, tokenizer, work.framing, waiting=Path(waiting))
        return tuple(replace(each, views=tuple(_with_bytes(view) for view in each.views)) for each in found)


def _with_bytes(view: EncodedView) -> EncodedView:
    assert isinstance(view.pixels, Path)
    return replace(view, pixels=np.fromfile(view.pixels, np.uint8))
