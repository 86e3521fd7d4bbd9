"""The processes of one job (`torchrun` starts them): which one this is, what they agree on, how they end together."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError, RankError, TotoError
from toto.runtime.progress import only_first_speaks

Made = TypeVar("Made")
NETWORK = re.compile(r"gloo|NCCL|ProcessGroup|TCPStore|[Cc]onnection|[Tt]imed? ?out|socket|Broken pipe|peer")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the job.

    Attributes:
        rank: its number, counted from 0.
        local: its number on this host.
        world: how many there are.
        on_host: how many there are on each host.
        beside: a group for what happens beside training, such as saving; None where there is one process only.
    """

    rank: int = 0
    local: int = 0
    world: int = 1
    on_host: int = 1
    beside: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """A device's name for this process: of several GPUs on a host, each takes its own."""
        if self.world == 1 or name not in ("auto", "cuda"):
            return name
        return f"cuda:{self.local}" if pick_device(name).type == "cuda" else name

    def added(self, values: Tensor) -> Tensor:
        """The sum over all processes; the same on each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, value: Made) -> list[Made]:
        """What each process gives, in their order; the same on each. By way of processors' memory."""
        if self.world == 1:
            return [value]
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, value, group=self.beside)
        return told

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, for all; an error of it is raised by all.

        Anything that files or seeds decide alike everywhere needs no word; this is for what is decided once.
        """
        if self.world == 1:
            return make()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = make()
            except TotoError as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        made: Made = told[0]
        return made


ALONE = Ranks()  # a job of one process


def summed(values: Tensor) -> Tensor:
    """The sum over all processes of the job, which gradients flow through."""
    out: Tensor = _Summed.apply(values)  # type: ignore[no-untyped-call]
    return out


class _Summed(torch.autograd.Function):
    """As every process has the sum, what it does to each process's loss comes back to all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        out = values.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Summed.forward(ctx, grads[0])


def rank_name() -> str:
    """`rank 1 of 3` in a job of several processes, empty in others."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return f"rank {rank} of {world}" if rank is not None and world != "1" else ""


def is_first() -> bool:
    """Whether this process prints for its job."""
    return not rank_name() or os.environ["RANK"] == "0"


@contextlib.contextmanager
def joined_ranks(*, device: str, timeout: float) -> Iterator[Ranks]:
    """Join the job that `torchrun` started, or be a job of one process.

    Args:
        device: that is computed on; GPUs talk by NCCL, processors by gloo.
        timeout: seconds after which a process that hears nothing of another one gives up.

    Raises:
        RankError: another process has gone.
        ConfigError: the job is described in part only, or can't be joined.
    """
    if not rank_name():
        yield ALONE
        return
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, on_host = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the job is described in part only ({error})", fix="start it with torchrun") from None
    gpu = pick_device(device).type == "cuda"
    if gpu:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{on_host} processes for {torch.cuda.device_count()} GPUs", fix="lower --nproc-per-node of torchrun"
            )
        torch.cuda.set_device(local)
    with translated(timeout):
        beside = _join("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout)
        with only_first_speaks(first=rank == 0):
            yield Ranks(rank=rank, local=local, world=world, on_host=on_host, beside=beside)


@functools.cache
def _join(backend: str, timeout: float) -> dist.ProcessGroup:
    """Join once, until this process ends: a job's processes can't find each other a second time."""
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group(backend, timeout=wait)
    atexit.register(_leave)
    beside: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=wait)
    return beside


def _leave() -> None:
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


@contextlib.contextmanager
def translated(timeout: float) -> Iterator[None]:
    """Around what waits for others: where one of them is gone, say so in one line."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not NETWORK.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0][:160]
        raise RankError(
            f"another process of the job has ended, or was silent for {timeout:.0f} s ({reason})",
            fix="see its own message, then start the same command with --resume",
        ) from error
