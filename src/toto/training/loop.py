"""The loop: draw a batch, step, log, evaluate, save; leave when asked, and go on exactly where it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toto.model.architectures import build
from toto.model.budget import parameter_line
from toto.model.budget.baselines import baseline_flops
from toto.model.budget.flops import positions_of, training_flops
from toto.model.causal import CausalModel
from toto.model.config import ModelConfig, with_patch_values, with_vocabulary
from toto.model.weights import Card, load_card, load_config, newest_checkpoint
from toto.runtime.device import autocast, peak_memory, pick_device, use_bf16
from toto.runtime.errors import CheckpointError, ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.files import remove_leftovers, write_json
from toto.runtime.interrupt import LEAVE_AFTER, StopRequest, stop_on_signal
from toto.runtime.machine import peak_of
from toto.runtime.metrics import Metrics
from toto.runtime.places import sha256_at
from toto.runtime.progress import Progress, say
from toto.runtime.provenance import as_plain
from toto.runtime.ranks import Ranks, joined_ranks
from toto.runtime.wandb_sink import WandbConfig
from toto.runtime.workers import StoppedError
from toto.tokens.online import Encoders
from toto.tokens.patches import patch_values
from toto.tokens.sequence import sequence_length, sequence_vocabulary
from toto.tokens.shards import MANIFEST
from toto.training.checkpoint import Saver, newest_whole_checkpoint, restore_checkpoint
from toto.training.config import TrainConfig
from toto.training.continuing import ancestors_of, start_from, write_continued
from toto.training.guard import Guard
from toto.training.mixture import Batch, Mixture, describe
from toto.training.optimizer import (
    clipped_step,
    gradient_norm,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from toto.training.parallel import laid_out, last_of_step, unchanged_weights, whole_weights
from toto.training.prefetch import ReadAhead
from toto.training.record import drawn_from, record, record_new_mixture, require_same_run
from toto.training.watch import LossWatch

Evaluate = Callable[[CausalModel], dict[str, float]]


def train(
    config: TrainConfig,
    out: Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    wandb: WandbConfig | None = None,
) -> Path:
    """Pre-train a model into a run folder; returns its last checkpoint.

    Args:
        config: the run.
        out: the run's folder: `made.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`.
        evaluate: called with the model every `eval_every` steps and at the end; its numbers are logged.
        resume: continue the run that the folder holds, from its newest checkpoint.
        wandb: show its metrics there, too.

    Raises:
        ConfigError: the data doesn't fit the model, or the folder holds a run and `resume` is not set.
        NonFiniteLossError: the loss is no longer a number; says where and what to do.
        InterruptedRunError: a signal arrived; everything is saved and `resume` continues.
    """
    with joined_ranks(device=config.device, timeout=config.parallel.timeout) as ranks:
        run = _prepare(replace(config, device=ranks.device(config.device)), out, resume, ranks, wandb)
        return _train(run, evaluate)


def _train(run: _Run, evaluate: Evaluate | None) -> Path:
    """`train`, in one of the processes of its job."""
    config, ranks = run.config, run.ranks
    with (
        closing(run.saver),
        closing(run.ahead),
        closing(run.mixture),  # first, so that nobody waits for what is being encoded
        stop_on_signal(leave_after=LEAVE_AFTER if ranks.world > 1 else None) as stop,
        Progress("training", total=config.steps, unit="steps", done=run.step) as progress,
    ):
        while run.step < config.steps:
            began = time.perf_counter()
            try:
                loss, norm, stopping = _step(run, stop)
            except StoppedError:  # a signal to the whole group of processes reaches those that encode too
                if not stop or ranks.world > 1:  # one of several processes can't save alone
                    raise
                raise _interrupted(run, stop) from None
            run.saver.check()
            if run.step % config.log_every == 0 or run.step == config.steps:
                _log(run, loss, norm, time.perf_counter() - began)
            progress.advance(
                note=f"loss {loss:.3f}, {run.tokens_in_step / (time.perf_counter() - began):,.0f} tokens/s"
            )
            if evaluate and (run.step % config.eval_every == 0 or run.step == config.steps):
                run.write({f"heldout/{name}": value for name, value in _evaluated(run, evaluate).items()})
            if run.step % config.eval_every == 0 or run.step == config.steps:
                _log_positions(run)
            if run.step % config.save_every == 0 or run.step == config.steps:
                run.save()
            if stopping and run.step < config.steps:
                raise _interrupted(run, stop)
    run.save()  # where nothing was left to do
    return run.finish()


@dataclass
class _Run:
    """A run in progress: what changes while it trains, and what it needs to."""

    config: TrainConfig
    out: Path
    ranks: Ranks
    mixture: Mixture
    ahead: ReadAhead[tuple[Batch, Tensor]]
    model: CausalModel
    learner: nn.Module
    optimizer: torch.optim.AdamW
    saver: Saver
    metrics: Metrics | None  # of the first process alone
    device: torch.device
    watch: LossWatch
    guard: Guard
    step: int = 0
    waited: float = 0.0  # seconds that the last step waited for its data

    @property
    def tokens_in_step(self) -> int:
        """Predicted tokens in a step; an end is predicted among codes, not among patches."""
        rows, cols = self.mixture.grid
        not_predicted = 2 if self.config.model.targets == "pixels" else 1
        return self.config.batch * (sequence_length(self.mixture.frames, rows, cols) - not_predicted)

    def write(self, values: dict[str, float]) -> None:
        """Add a row of metrics, which are the same in each process."""
        if self.metrics is not None:
            self.metrics.write(self.step, values)

    def finish(self) -> Path:
        """Wait for what is being saved; returns the last checkpoint."""
        self.saver.wait()
        if self.metrics is not None:
            self.metrics.close()
        return self.out / "checkpoints" / f"step-{self.step:08d}"

    def save(self) -> None:
        """Save a checkpoint of the finished steps; it is written while training goes on."""
        card = Card(
            passport=self.mixture.passport.to_dict(),
            sequence=_sequence_form(self.mixture),
            training={
                "step": self.step,
                "tokens": self.step * self.tokens_in_step,
                "data": _data_hashes(self.mixture),
                "watch": self.watch.state(self.ranks.added(self.watch.totals())),
                "guard": self.guard.state(),
                **ancestors_of(self.out),
            },
        )
        self.saver.save(self.model, self.optimizer, card, step=self.step)


def _newest(out: Path, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from."""
    remove_leftovers(out / "checkpoints")
    if newest_checkpoint(out) and not resume:
        raise ConfigError("already holds a run", where=out, fix="add --resume to continue it, or choose another --out")
    return newest_whole_checkpoint(out)


def _prepare(config: TrainConfig, out: Path, resume: bool, ranks: Ranks, wandb: WandbConfig | None) -> _Run:
    """Open the data, make or restore model and optimizer, and open the metrics."""
    device = pick_device(config.device)
    if config.batch % (ranks.world * config.micro_batch):
        raise ConfigError(
            f"{config.batch} sequences are no multiple of {ranks.world} processes x {config.micro_batch}",
            where="--batch",
            fix="change --batch, --micro-batch or the number of processes",
        )
    newest = ranks.from_first(lambda: _newest(out, resume))
    sees_pixels = config.model.inputs == "patches"
    mixture = Mixture(
        config.data.sources,
        frames=config.data.frames,
        seed=config.seed,
        pixels=sees_pixels,
        changes=config.data.changes(config.batch),
        verify="read" if config.data.checks else "never",
        views=config.data.views,
        encoders=Encoders(workers=config.data.workers, device=config.device),
    )
    architecture = with_vocabulary(config.model, sequence_vocabulary(mixture.passport.vocab_size))
    if isinstance(architecture, ModelConfig) and sees_pixels:
        architecture = with_patch_values(architecture, patch_values(mixture.passport))
    torch.manual_seed(config.seed)
    model = build(architecture).to(device)
    rules = model.weight_rules()
    continued = start_from(config, model, mixture) if config.init is not None and newest is None else None
    rows, cols = mixture.grid
    codes = config.model.targets == "codes"
    watch = LossWatch(config.data.sources, frames=mixture.frames, cells=rows * cols, ends=codes, device=device)
    guard = Guard(
        config.guard,
        out=out,
        blind=math.log(mixture.passport.vocab_size) if codes else 1.0,
        optimizer=config.optimizer,
        changes=_of_guard(config),
    )
    bf16 = use_bf16(config.precision, device)
    learner = laid_out(model, config.parallel, ranks, device=device, bf16=bf16)
    optimizer = make_optimizer(model, config.optimizer, rules=rules)
    resolved = replace(config, model=architecture)
    step = 0
    if newest:
        step = int(load_card(newest).training["step"])
        if (kind := load_config(newest).kind) != architecture.kind:
            raise ConfigError(
                f"holds a run of a {kind} model, the recipe's is {architecture.kind}",
                where=out,
                fix="use a recipe of the same, or another --out",
            )
        ranks.from_first(lambda: require_same_run(resolved, out, step))
        card = restore_checkpoint(newest, model, optimizer, ranks=ranks)
        used = len(drawn_from(as_plain(config.data), step)["sources"])
        if card.training["data"][:used] != _data_hashes(mixture)[:used]:
            raise CheckpointError(
                "was trained on other shards", where=newest, fix="give the same data, or another --out"
            )
        if "watch" in card.training:
            watch.restore(card.training["watch"], first=ranks.first)
            guard.restore(card.training["guard"])
        ranks.from_first(lambda: record_new_mixture(resolved, out, step))
    else:
        ranks.from_first(lambda: record(resolved, out))
        ranks.from_first(lambda: write_continued(continued, out))
    for line in continued.lines() if continued else ():
        say(line)
    for source in mixture.sources:
        say(str(source))
    beside = f", {ranks.world} processes ({config.parallel.strategy})" if ranks.world > 1 else ""
    say(f"model: {parameter_line(architecture)}, on {device}{beside}")
    metrics = None
    if ranks.first:
        metrics = Metrics(out, continue_from=step if newest else None, wandb=wandb, config=as_plain(resolved))
    pinned = device.type == "cuda"
    ahead = ReadAhead(
        lambda step: _read(mixture, config, step, ranks, pinned=pinned), end=config.steps, workers=config.data.workers
    )
    saver = Saver(
        out,
        ranks=ranks,
        keep=config.keep,
        keep_every=config.keep_every,
        background=config.save_in_background,
        last=step if newest else None,
    )
    parts = (mixture, ahead, model, learner, optimizer, saver, metrics, device, watch, guard)
    return _Run(config, out, ranks, *parts, step)


def _read(mixture: Mixture, config: TrainConfig, step: int, ranks: Ranks, *, pinned: bool) -> tuple[Batch, Tensor]:
    """The windows of a step that are this process's, and their sequences."""
    slots = slice(ranks.rank, None, ranks.world)
    batch = mixture.batch(step, config.batch, slots=slots, pinned=pinned)
    return batch, batch.sequences(config.data.frames_at(step), pinned=pinned)


def _step(run: _Run, stop: StopRequest) -> tuple[float, float, bool]:
    """One optimizer step of all processes.

    Returns the batch's mean loss, the gradient's norm before clipping, and whether somebody was asked to stop: the
    same in each process.
    """
    config = run.config
    began = time.perf_counter()
    batch, sequences = run.ahead.take(run.step)
    run.waited = time.perf_counter() - began
    set_learning_rate(run.optimizer, learning_rate(run.step, config.steps, config.optimizer))
    loss = _passes(run, batch, sequences)
    norm_of_all = gradient_norm(run.model.parameters())
    norm = float(norm_of_all)
    known = torch.stack([loss.double(), torch.tensor(float(bool(stop)), device=run.device)])
    total, asked = run.ranks.added(known).tolist()
    mean = total / run.ranks.world
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise _non_finite(run, mean, norm, batch.windows())
    clipped_step(run.optimizer, norm_of_all, config.optimizer.clip)
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.guard.check(run.step, mean, norm, lambda: _items(batch.windows()))
    return mean, norm, asked > 0


def _passes(run: _Run, batch: Batch, sequences: Tensor) -> Tensor:
    """Forward and backward, a micro-batch at a time; returns the mean loss of this process."""
    config = run.config
    run.learner.train()
    losses: list[Tensor] = []
    parts = sequences.chunk(len(batch) // config.micro_batch)
    with unchanged_weights(run.learner, len(parts)):
        for first, part in zip(range(0, len(batch), config.micro_batch), parts, strict=True):
            windows = slice(first, first + config.micro_batch)
            patches = batch.patches(config.data.frames_at(run.step), part=windows, device=run.device)
            last_of_step(run.learner, windows.stop == len(batch))
            with autocast(config.precision, run.device):
                loss, each = run.learner(part.to(run.device, non_blocking=True), patches)
            (loss * config.micro_batch / len(batch)).backward()
            losses.append(loss.detach())
            run.watch.add(each, batch.source[windows])
    return torch.stack(losses).mean()


def _evaluated(run: _Run, evaluate: Evaluate) -> dict[str, float]:
    """What an evaluation finds; of several processes, each finds the same."""
    with whole_weights(run.learner), autocast(run.config.precision, run.device):
        return evaluate(run.model.eval())


def _interrupted(run: _Run, stop: StopRequest) -> InterruptedRunError:
    run.save()
    run.finish()
    return InterruptedRunError(
        f"stopped by {stop.name or 'a signal'} after step {run.step}", where=run.out, fix="add --resume to continue"
    )


def _log(run: _Run, loss: float, norm: float, seconds: float) -> None:
    rate = learning_rate(run.step - 1, run.config.steps, run.config.optimizer)
    values = {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate}
    if run.config.model.targets == "codes":
        values["train/bits_per_token"] = loss / math.log(2)
    speed = {
        "train/tokens": run.step * run.tokens_in_step,
        "speed/tokens_per_second": run.tokens_in_step / seconds,
        "speed/data_wait": run.waited / seconds,
        "memory/peak_gb": peak_memory(run.device) / 1e9,
    }
    speed["speed/gflops"] = _flops(run) / seconds / 1e9
    if peak := peak_of(run.device, bf16=use_bf16(run.config.precision, run.device)):
        speed["speed/mfu"] = 1e9 * speed["speed/gflops"] / (peak * run.ranks.world)
    watched = run.watch.take(run.ranks.added(run.watch.totals()))
    run.write(values | speed | watched | {"train/spikes": run.guard.spikes})


def _flops(run: _Run) -> int:
    """Operations of the last step; see `toto.model.budget.flops` for what counts."""
    rows, cols = run.mixture.grid
    frames = run.config.data.frames_at(run.step - 1)
    architecture = run.model.config
    positions = positions_of(architecture, frames * rows * cols)
    sequences = run.config.batch * run.mixture.frames // frames
    flops = training_flops if isinstance(architecture, ModelConfig) else baseline_flops
    return flops(architecture, batch=sequences, positions=positions).total  # type: ignore[arg-type]


def _non_finite(run: _Run, loss: float, norm: float, windows: list[Any]) -> NonFiniteLossError:
    """Write down what the batch held, and say where training can go on from."""
    run.saver.close()
    name = f"non-finite-step-{run.step + 1}"
    report = run.out / (f"{name}.json" if run.ranks.world == 1 else f"{name}-rank-{run.ranks.rank}.json")
    write_json(report, {"step": run.step + 1, "loss": str(loss), "grad_norm": str(norm), "batch": describe(windows)})
    last = newest_checkpoint(run.out)
    items = _items(windows)
    return NonFiniteLossError(
        f"loss {loss}, gradient norm {norm} at step {run.step + 1} (items {items[:300]}; all in {report.name}); "
        f"last good checkpoint: {last or 'none'}",
        where=run.out,
        fix="lower optimizer.peak_lr or look at these items, then --resume",
    )


def _sequence_form(mixture: Mixture) -> dict[str, int]:
    rows, cols = mixture.grid
    return {"frames": mixture.frames, "rows": rows, "cols": cols, "stride": mixture.stride}


def _data_hashes(mixture: Mixture) -> list[str]:
    """SHA-256 of every source's manifest, which holds the checksums of all its files."""
    return [sha256_at(source.config.path / MANIFEST) for source in mixture.sources]


def _items(windows: list[Any]) -> str:
    """The names of what a batch holds."""
    return ", ".join(dict.fromkeys(name for window in windows for name, _ in window.origin))


def _of_guard(config: TrainConfig) -> list[int]:
    return [change.step for change in config.data.schedule] + [config.data.short_steps]


def _log_positions(run: _Run) -> None:
    """Losses by frame of the rows since this was last called."""
    values = run.watch.positions()
    if run.metrics is not None:
        run.metrics.write_positions(run.step, values)
