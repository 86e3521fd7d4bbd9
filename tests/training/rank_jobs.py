"""What `test_ranks` runs under torchrun: python -m torch.distributed.run ... rank_jobs.py JOBS.pkl."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from toto.__main__ import main
from toto.runtime.errors import InterruptedRunError
from toto.training import loop
from toto.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, and what happens to it.

    Attributes:
        config: of the run.
        out: its folder.
        resume: whether it goes on.
        send: (step, rank, signal): this rank gets the signal before the step.
    """

    config: TrainConfig
    out: Path
    resume: bool = False
    send: tuple[int, int, int] | None = None


def bits(model):
    """A number that needs all weights."""
    with torch.inference_mode():
        return {"mean": float(model(torch.arange(8)[None]).logits.square().mean())}


def run(jobs: list[Job]) -> None:
    step = loop._step
    for job in jobs:

        def step_or_signal(run, stop, job=job):
            if job.send is not None and (run.step, run.ranks.rank) == job.send[:2]:
                os.kill(os.getpid(), job.send[2])
            return step(run, stop)

        loop._step = step_or_signal
        try:
            loop.train(job.config, job.out, evaluate=bits, resume=job.resume)
        except InterruptedRunError:
            if job.send is None or job.send[2] != signal.SIGTERM:
                raise


class Command:
    """A verb that runs the jobs, so that errors end the process as those of every verb do."""

    @staticmethod
    def run(words: list[str]) -> None:
        torch.set_num_threads(1)
        run(pickle.loads(Path(words[0]).read_bytes()))  # noqa: S301  # the test wrote it


if __name__ == "__main__":
    sys.modules["toto.commands.train"] = Command  # type: ignore[assignment]
    raise SystemExit(main(["train", *sys.argv[1:]]))
