"""Everything that decides a pre-training run, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field

from toto.model.config import BackboneConfig
from toto.runtime.device import Precision
from toto.runtime.errors import ConfigError
from toto.training.guard import GuardConfig
from toto.training.mixture import MixtureChange
from toto.training.optimizer import OptimizerConfig
from toto.training.parallel import ParallelConfig
from toto.training.source import SourceConfig, Views


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on.

    Attributes:
        sources: shard folders with their weights and modalities.
        heldout: shard folders that are only evaluated on.
        schedule: changes of the sources' weights, in rising order of their steps. Weights count sequences. All
            sequences of a mixture have T x rows x cols tokens, so they are shares of its tokens too, and a number of
            tokens is as good a weight as 0.2.
        frames: T, frames (or images) in a sequence (the paper: 16).
        short_steps: for this many steps at the beginning, each window is cut into sequences of `short_frames`
            frames, which all count in its place. Copying from the frame before is found far sooner in short ones.
        short_frames: frames of these; must divide T.
        workers: batches made ahead of their step. For stored codes as many threads make them; for stores that
            `toto tokenize --online` made, as many processes decode and encode. 0 makes each batch when it is needed.
            Batches are the same with any number.
        views: of an input that was tokenized several times (`toto tokenize --views`), take all views in each epoch, or
            one in each, in turn.
        checks: compare every file of the shards with its checksum before anything of it is used. Reads each file
            once more, when it is first needed.
    """

    sources: tuple[SourceConfig, ...] = ()
    heldout: tuple[SourceConfig, ...] = ()
    schedule: tuple[MixtureChange, ...] = ()
    frames: int = 16
    short_steps: int = 0
    short_frames: int = 2
    workers: int = 1
    views: Views = "all"
    checks: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"must be at least 1, is {self.frames}", where="--data.frames")
        if self.workers < 0:
            raise ConfigError(f"must not be negative, is {self.workers}", where="--data.workers")
        if self.short_steps and (self.short_frames < 1 or self.frames % self.short_frames):
            raise ConfigError(f"{self.short_frames} doesn't divide {self.frames}", where="--data.short-frames")
        steps = [change.step for change in self.schedule]
        if steps != sorted({*steps}) or any(step < 1 for step in steps):
            raise ConfigError(f"steps {steps} don't rise from 1 on", where="--data-at", fix="name each step once")
        for change in self.schedule:
            if len(change.weights) != len(self.sources):
                raise ConfigError(
                    f"{len(change.weights)} weights for {len(self.sources)} sources at step {change.step}",
                    where="data.schedule",
                    fix="give one for each source",
                )

    def changes(self, batch: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """The schedule by sequence number: (first sequence, weights of all sources)."""
        return tuple((change.step * batch, change.weights) for change in self.schedule)

    def frames_at(self, step: int) -> int:
        """Frames in a sequence at a step."""
        return self.short_frames if step < self.short_steps else self.frames


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A pre-training run.

    Attributes:
        data: what is trained on.
        model: the architecture; its vocabulary and patch values come from the data.
        optimizer: AdamW and its schedule.
        guard: what is said of spikes, and when a run that has diverged is stopped.
        init: start from this checkpoint's weights (a checkpoint or run folder, or a hub id); the step count, the
            optimizer and the order begin anew. Its sequences may have been shorter, its rope_base another.
        steps: optimizer steps.
        batch: sequences in a step.
        micro_batch: sequences in one forward pass; gradients are accumulated over batch / micro_batch of them.
        seed: of the initial weights and of the data's order.
        precision: auto, bf16 (matrix products in bfloat16, weights in fp32) or fp32.
        device: auto, cpu, cuda, cuda:1, ...
        parallel: the layout over several processes, which `torchrun` starts, and what a step keeps in memory.
        log_every: steps between rows of metrics.jsonl.
        eval_every: steps between evaluations on the held-out sequences.
        eval_sequences: at most this many of each held-out source, spread evenly over it.
        save_every: steps between checkpoints.
        save_in_background: train on while a checkpoint is written, for a copy of weights and moments (12 bytes a
            weight) in memory.
        keep: how many checkpoints are kept, the newest ones.
        keep_every: beside them, the checkpoints of every so many steps are kept; 0 for none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: BackboneConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    init: str | None = None
    steps: int
    batch: int
    micro_batch: int
    seed: int = 0
    precision: Precision = "auto"
    device: str = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log_every: int = 10
    eval_every: int = 1000
    eval_sequences: int = 64
    save_every: int = 1000
    save_in_background: bool = True
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "micro_batch",
            "log_every",
            "eval_every",
            "eval_sequences",
            "save_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"--{name.replace('_', '-')}")
        if self.keep_every < 0 or self.keep_every % self.save_every:
            raise ConfigError(
                f"must be a multiple of --save-every {self.save_every}, is {self.keep_every}", where="--keep-every"
            )
        if not self.model.causal:
            raise ConfigError(
                "full attention would see what it is to predict", where="--model.attention", fix="leave it out"
            )
        if self.batch % self.micro_batch:
            raise ConfigError(
                f"{self.batch} is not a multiple of the micro-batch {self.micro_batch}",
                where="--batch",
                fix="change one",
            )
