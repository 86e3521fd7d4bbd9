"""The loop: draw a batch, step, log, evaluate, save; leave when asked, and go on exactly where it was."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toto.model.architectures import build, config_class, described
from toto.model.budget import parameter_line
from toto.model.budget.flops import training_flops
from toto.model.causal import CausalModel
from toto.model.config import ModelConfig, with_patch_values, with_vocabulary
from toto.model.weights import Card, load_card, load_config, load_model, newest_checkpoint
from toto.runtime.device import autocast, peak_memory, pick_device
from toto.runtime.errors import CheckpointError, ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.files import read_json, remove_leftovers, write_json
from toto.runtime.interrupt import StopRequest, stop_on_signal
from toto.runtime.metrics import Metrics
from toto.runtime.places import sha256_at
from toto.runtime.progress import Progress, say
from toto.runtime.provenance import ANOTHER, RECORD, as_plain, write_provenance
from toto.runtime.workers import StoppedError
from toto.tokens.online import Encoders
from toto.tokens.passport import Passport
from toto.tokens.patches import patch_values
from toto.tokens.sequence import sequence_length, sequence_vocabulary
from toto.tokens.shards import MANIFEST
from toto.training.checkpoint import newest_whole_checkpoint, restore_checkpoint, save_checkpoint
from toto.training.config import DataConfig, TrainConfig
from toto.training.mixture import Batch, Mixture, describe
from toto.training.objective import next_token_loss
from toto.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from toto.training.prefetch import ReadAhead

Evaluate = Callable[[CausalModel], dict[str, float]]
FREE_TO_CHANGE = ("device", "keep", "keep_every", "log_every", "save_every", "eval_every", "eval_sequences")
FREE_DATA = ("heldout", "checks", "schedule", "workers")  # of the data; the schedule is compared by itself


def train(config: TrainConfig, out: Path, *, evaluate: Evaluate | None = None, resume: bool = False) -> Path:
    """Pre-train a model into a run folder; returns its last checkpoint.

    Args:
        config: the run.
        out: the run's folder: `made.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`.
        evaluate: called with the model every `eval_every` steps and at the end; its numbers are logged.
        resume: continue the run that the folder holds, from its newest checkpoint.

    Raises:
        ConfigError: the data doesn't fit the model, or the folder holds a run and `resume` is not set.
        NonFiniteLossError: the loss is no longer a number; says where and what to do.
        InterruptedRunError: a signal arrived; everything is saved and `resume` continues.
    """
    run = _prepare(config, out, resume)
    with (
        closing(run.ahead),
        closing(run.mixture),  # first, so that nobody waits for what is being encoded
        stop_on_signal() as stop,
        Progress("training", total=config.steps, unit="steps", done=run.step) as progress,
    ):
        while run.step < config.steps:
            began = time.perf_counter()
            try:
                loss, norm = _step(run)
            except StoppedError:  # a signal to the whole group of processes reaches those that encode too
                if not stop:
                    raise
                run.save()
                raise _interrupted(run, stop) from None
            if run.step % config.log_every == 0 or run.step == config.steps:
                _log(run, loss, norm, time.perf_counter() - began)
            progress.advance(
                note=f"loss {loss:.3f}, {run.tokens_in_step / (time.perf_counter() - began):,.0f} tokens/s"
            )
            if evaluate and (run.step % config.eval_every == 0 or run.step == config.steps):
                run.metrics.write(
                    run.step, {f"heldout/{name}": value for name, value in evaluate(run.model.eval()).items()}
                )
            if run.step % config.save_every == 0 or run.step == config.steps or stop:
                run.save()
            if stop and run.step < config.steps:
                raise _interrupted(run, stop)
    run.metrics.close()
    return run.save()


@dataclass
class _Run:
    """A run in progress: what changes while it trains, and what it needs to."""

    config: TrainConfig
    out: Path
    mixture: Mixture
    ahead: ReadAhead[tuple[Batch, Tensor]]
    model: CausalModel
    optimizer: torch.optim.Optimizer
    metrics: Metrics
    device: torch.device
    step: int = 0
    waited: float = 0.0  # seconds that the last step waited for its data

    @property
    def tokens_in_step(self) -> int:
        """Predicted tokens in a step; an end is predicted among codes, not among patches."""
        rows, cols = self.mixture.grid
        not_predicted = 2 if self.config.model.targets == "pixels" else 1
        return self.config.batch * (sequence_length(self.mixture.frames, rows, cols) - not_predicted)

    def save(self) -> Path:
        """Save a checkpoint of the finished steps."""
        card = Card(
            passport=self.mixture.passport.to_dict(),
            sequence=_sequence_form(self.mixture),
            training={
                "step": self.step,
                "tokens": self.step * self.tokens_in_step,
                "data": _data_hashes(self.mixture),
            },
        )
        return save_checkpoint(
            self.out,
            self.model,
            self.optimizer,
            card,
            step=self.step,
            keep=self.config.keep,
            keep_every=self.config.keep_every,
        )


def _prepare(config: TrainConfig, out: Path, resume: bool) -> _Run:
    """Open the data, make or restore model and optimizer, and open the metrics."""
    device = pick_device(config.device)
    remove_leftovers(out / "checkpoints")
    if newest_checkpoint(out) and not resume:
        raise ConfigError("already holds a run", where=out, fix="add --resume to continue it, or choose another --out")
    newest = newest_whole_checkpoint(out)
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
    optimizer = make_optimizer(model, config.optimizer, rules=model.weight_rules())
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
        _require_same_run(resolved, out, step)
        card = restore_checkpoint(newest, model, optimizer)
        used = len(_drawn_from(as_plain(config.data), step)["sources"])
        if card.training["data"][:used] != _data_hashes(mixture)[:used]:
            raise CheckpointError(
                "was trained on other shards", where=newest, fix="give the same data, or another --out"
            )
        _record_new_mixture(resolved, out, step)
    else:
        if config.init is not None:
            start_from(config.init, model, mixture.passport)
        if out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
            raise ConfigError("is not empty and holds no run", where=out, fix=ANOTHER)
        write_provenance(out, resolved)
    for source in mixture.sources:
        say(str(source))
    say(f"model: {parameter_line(architecture)}, on {device}")
    metrics = Metrics(out, continue_from=step if newest else None)
    pinned = device.type == "cuda"
    ahead = ReadAhead(
        lambda step: _read(mixture, config, step, pinned=pinned), end=config.steps, workers=config.data.workers
    )
    return _Run(config, out, mixture, ahead, model, optimizer, metrics, device, step)


def start_from(checkpoint: str, model: CausalModel, passport: Passport) -> None:
    """Load another run's weights into a new model.

    Raises:
        PassportError: another tokenizer made its tokens.
        ConfigError: it is of another architecture.
    """
    known = Passport.from_dict(load_card(checkpoint).passport, where=checkpoint)
    passport.require_tokenizer(known, where=checkpoint, fix="start from a model of the same tokenizer")
    other = load_model(checkpoint)
    before, now = described(other.config), described(model.config)
    if before["kind"] != now["kind"]:
        before, now = {"kind": before["kind"]}, {"kind": now["kind"]}
    different = [line for line in _differences(before, now) if not line.startswith("rope_base ")]
    if different:
        raise ConfigError(f"is of another architecture ({'; '.join(different)})", where=checkpoint, fix="use the same")
    model.load_state_dict(other.state_dict())


def _read(mixture: Mixture, config: TrainConfig, step: int, *, pinned: bool) -> tuple[Batch, Tensor]:
    """The windows of a step, and their sequences."""
    batch = mixture.batch(step, config.batch, pinned=pinned)
    return batch, batch.sequences(config.data.frames_at(step), pinned=pinned)


def _step(run: _Run) -> tuple[float, float]:
    """One optimizer step; returns the batch's mean loss and the gradient's norm before clipping."""
    config = run.config
    began = time.perf_counter()
    batch, sequences = run.ahead.take(run.step)
    run.waited = time.perf_counter() - began
    set_learning_rate(run.optimizer, learning_rate(run.step, config.steps, config.optimizer))
    run.model.train()
    losses: list[Tensor] = []
    parts = sequences.chunk(config.batch // config.micro_batch)
    for first, part in zip(range(0, config.batch, config.micro_batch), parts, strict=True):
        windows = slice(first, first + config.micro_batch)
        patches = batch.patches(config.data.frames_at(run.step), part=windows, device=run.device)
        with autocast(config.precision, run.device):
            loss = next_token_loss(run.model, part.to(run.device, non_blocking=True), patches)
        (loss * config.micro_batch / config.batch).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.optimizer.clip))
    mean = float(torch.stack(losses).mean())
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise _non_finite(run, mean, norm, batch.windows())
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return mean, norm


def _interrupted(run: _Run, stop: StopRequest) -> InterruptedRunError:
    run.metrics.close()
    return InterruptedRunError(
        f"stopped by {stop.name} after step {run.step}", where=run.out, fix="add --resume to continue"
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
    if isinstance(architecture := run.model.config, ModelConfig):
        speed["speed/gflops"] = _flops(run, architecture) / seconds / 1e9
    run.metrics.write(run.step, values | speed)


def _flops(run: _Run, architecture: ModelConfig) -> int:
    """Operations of the last step; see `toto.model.budget.flops` for what counts."""
    rows, cols = run.mixture.grid
    frames = run.config.data.frames_at(run.step - 1)
    not_seen = 2 if architecture.targets == "pixels" else 1
    positions = sequence_length(frames, rows, cols) - not_seen
    sequences = run.config.batch * run.mixture.frames // frames
    return training_flops(architecture, batch=sequences, positions=positions).total


def _non_finite(run: _Run, loss: float, norm: float, windows: list[Any]) -> NonFiniteLossError:
    """Write down what the batch held, and say where training can go on from."""
    run.metrics.close()
    report = run.out / f"non-finite-step-{run.step + 1}.json"
    write_json(report, {"step": run.step + 1, "loss": str(loss), "grad_norm": str(norm), "batch": describe(windows)})
    last = newest_checkpoint(run.out)
    items = ", ".join(dict.fromkeys(name for window in windows for name, _ in window.origin))
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


def _require_same_run(config: TrainConfig, out: Path, step: int) -> None:
    """Refuse to continue after `step` steps with options that would make it another run."""
    before = read_json(out / RECORD, what="record of the run")["config"]
    now = as_plain(config)
    different = _differences(_comparable(before, step), _comparable(now, step))
    if different:
        raise ConfigError(
            f"holds a run with other options ({'; '.join(different)})",
            where=out,
            fix="use the same, or another --out",
        )


def _comparable(config: dict[str, Any], step: int) -> dict[str, Any]:
    """The options that decided the result of the first `step` steps, or decide everything after them.

    Where the shards lie doesn't, their checksums are compared instead; nor does a mixture that is still to come.
    Options that a run's record is too old to name had their defaults.
    """
    kept = {name: value for name, value in config.items() if name not in FREE_TO_CHANGE}
    drawn_from = _drawn_from(config["data"], step)
    data = {name: value for name, value in config["data"].items() if name not in FREE_DATA}
    return kept | {
        "data": {
            **_defaults(DataConfig, but=FREE_DATA),
            **data,
            "sources": drawn_from["sources"],
            f"schedule before step {step}": drawn_from["schedule"],
        },
        "model": _defaults(config_class(config["model"])) | config["model"],
    }


def _defaults(kind: type[Any], *, but: Collection[str] = ()) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(kind) if field.default is not MISSING and field.name not in but]
    return {field.name: as_plain(field.default) for field in fields}


def _drawn_from(data: dict[str, Any], step: int) -> dict[str, Any]:
    """The mixture as far as it has decided the first `step` steps: without later changes and sources that join then."""
    schedule = [change for change in data.get("schedule", []) if change["step"] < step]
    weights = [[source["weight"] for source in data["sources"]], *(change["weights"] for change in schedule)]
    used = 1 + max(number for row in weights for number, weight in enumerate(row) if weight)
    return {
        "sources": [{**source, "path": None} for source in data["sources"][:used]],
        "schedule": [{**change, "weights": change["weights"][:used]} for change in schedule],
    }


def _record_new_mixture(config: TrainConfig, out: Path, step: int) -> None:
    """Where a run goes on with another mixture, make that its record and keep the one before beside it."""
    before = read_json(out / RECORD, what="record of the run")["config"]["data"]
    if _drawn_from(before, config.steps) != _drawn_from(as_plain(config.data), config.steps):
        shutil.copyfile(out / RECORD, out / f"made-before-step-{step + 1}.json")
        write_provenance(out, config)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if before == now else [f"{name} was {before}, is {now}"]
