"""What `test_finetune_ranks` runs under torchrun: python -m torch.distributed.run ... finetune_jobs.py JOBS.pkl."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from toto.__main__ import main
from toto.evaluation import finetune as module
from toto.evaluation.finetune_config import FinetuneConfig
from toto.evaluation.labelled import catalog_clips
from toto.runtime.errors import InterruptedRunError
from toto.tokens.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, and what happens to it.

    Attributes:
        config: of the run.
        out: its folder.
        checkpoint: what is fine-tuned.
        tokenizer: its folder.
        pictures: the folder that holds `train` and `test`.
        resume: whether it goes on.
        send: (step, rank, signal): this rank gets the signal before the step.
    """

    config: FinetuneConfig
    out: Path
    checkpoint: str
    tokenizer: Path
    pictures: Path
    resume: bool = False
    send: tuple[int, int, int] | None = None


def run(job: Job) -> None:
    """Fine-tune as the job says."""
    step = module._step

    def step_or_signal(run, batch):
        if job.send is not None and (run.step, run.ranks.rank) == job.send[:2]:
            os.kill(os.getpid(), job.send[2])
        return step(run, batch)

    module._step = step_or_signal
    train, test = (catalog_clips(str(job.pictures / part), frames=1, stride=1) for part in ("train", "test"))
    try:
        module.finetune(
            job.config,
            job.out,
            checkpoint=job.checkpoint,
            tokenizer=load_tokenizer(job.tokenizer),
            train=train,
            test=test,
            resume=job.resume,
        )
    except InterruptedRunError:
        if job.send is None or job.send[2] != signal.SIGTERM:
            raise
    finally:
        module._step = step


class Command:
    """A verb that runs the jobs, so that errors end the process as those of every verb do."""

    @staticmethod
    def run(words: list[str]) -> None:
        torch.set_num_threads(1)
        for job in pickle.loads(Path(words[0]).read_bytes()):  # noqa: S301  # the test wrote it
            run(job)


if __name__ == "__main__":
    sys.modules["toto.commands.finetune"] = Command  # type: ignore[assignment]
    raise SystemExit(main(["finetune", *sys.argv[1:]]))
