"""Training of tokenizers: one function that builds, restores, steps, looks, saves.

A run is defined by its number of steps, its seed and its configuration. What is drawn at a step depends on the seed
and the step alone, and the whole state is saved, so a run that was stopped goes on as if nothing had happened. What
a step optimises is the method's affair (`toto.training.learner`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from toto.media.ledger import LedgerRow
from toto.runtime.device import Precision, autocast, pick_device
from toto.runtime.errors import CheckpointError, ConfigError, InterruptedRunError, NonFiniteLossError
from toto.runtime.files import written_aside
from toto.runtime.interrupt import stop_on_signal
from toto.runtime.metrics import Metrics
from toto.runtime.progress import Progress, duration, say
from toto.runtime.provenance import as_plain, write_provenance
from toto.runtime.seed import integer, stream
from toto.tokens.neural import Network, NeuralTokenizer
from toto.tokens.quality import ReconstructionReport
from toto.tokens.shards import write_ledger
from toto.tokens.tokenizer import tokenizer_class
from toto.training.learner import Method, Moment, Part
from toto.training.tokenizer_data import CropConfig, Crops, Source, load_squares
from toto.training.tokenizer_heldout import evaluate, flat, rounded, warn_of_collapse

STATE_FILE: Final = "trainer.safetensors"


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """Everything that decides what a run makes.

    Attributes:
        name: the recipe's name.
        kind: of the tokenizer ("dvae", "vqgan", ...).
        model: the architecture, of this kind.
        method: what is optimised, and how the codes learn.
        crops: what is cut out of the frames.
        cooldown_crops: the same during the cool-down.
        sources: frames to train on.
        heldout: frames to look at while it trains; never trained on.
        heldout_size: side of the square held-out frames in pixels.
        seed: of everything that is drawn.
        steps: how many steps the run has.
        batch: crops a step.
        parts: a step's crops are computed in this many parts side by side, which share the process's threads.
            On a CPU that others use too this is far faster than one part with several threads.
        learning_rate: AdamW's, at its height.
        warmup_steps: steps over which it rises from nought.
        cooldown_steps: last steps, over which it falls.
        cooldown: along which curve: 1 - "sqrt" of the share that has passed, or half a "cosine".
        final_learning_rate: where it falls to.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip: the gradient's norm is at most this.
        average_decay: decay of the average over the weights, which is what is kept in the end.
        precision: of the matrix products.
        report_every: steps between rows of metrics.
        evaluate_every: steps between looks at the held-out frames.
        save_every: steps between saves.
        collapse_below: share of the vocabulary in use on held-out frames under which a warning is given.
    """

    name: str
    kind: str
    model: Any
    method: Method
    crops: CropConfig
    cooldown_crops: CropConfig
    sources: tuple[Source, ...]
    heldout: tuple[Source, ...]
    heldout_size: int
    seed: int
    steps: int
    batch: int
    parts: int
    learning_rate: float
    warmup_steps: int
    cooldown_steps: int
    cooldown: Literal["sqrt", "cosine"] = "sqrt"
    final_learning_rate: float = 0.0
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    average_decay: float
    precision: Precision
    report_every: int
    evaluate_every: int
    save_every: int
    collapse_below: float


def train_tokenizer(config: TokenizerTrainConfig, *, out: Path, resume: bool, device: str = "auto") -> NeuralTokenizer:
    """Train a tokenizer into a folder; returns what was written there.

    The folder gets `tokenizer.json` and `model.safetensors` when the run is finished, and on the way `made.json`,
    `ledger.parquet`, `metrics.jsonl`, TensorBoard events and the trainer's state.

    Args:
        config: the run.
        out: the folder.
        resume: go on with the run that is in the folder; from the start where nothing was saved yet.
        device: where it computes.

    Raises:
        ConfigError: the folder holds a run and `resume` is not set, or a run of another configuration.
        CheckpointError: the trainer's state is damaged.
        NonFiniteLossError: the loss became infinite or not a number.
        InterruptedRunError: a signal arrived; everything was saved.
    """
    state_file = out / STATE_FILE
    if not config.sources or not config.heldout:
        raise ConfigError("no frames to train on or to look at", where=out, fix="give --data and --heldout")
    if state_file.exists() and not resume:
        raise ConfigError("holds a run already", where=out, fix="continue it with --resume or choose another folder")
    run = Run(config, pick_device(device))
    if state_file.exists():
        run.restore(state_file)
    else:
        write_provenance(out, config)
    crops = Crops(config.sources, config.seed)
    squares = {source.name: load_squares(source, config.heldout_size) for source in config.heldout}
    heldout = {name: frames for name, (frames, _) in squares.items()}
    parts = {"train": crops.ledger, "heldout": {name: rows for name, (_, rows) in squares.items()}}
    write_ledger(out, joined_ledger(parts))
    metrics = Metrics(out, continue_from=run.step or None)
    began = time.monotonic()
    with contextlib.closing(metrics), threads_for(config.parts):
        loop(run, crops, heldout, metrics, out)
        look = evaluate(run.tokenizer(), heldout)
        metrics.write(run.step, flat(look))
    tokenizer = run.tokenizer(story(run, crops, look))
    tokenizer.save(out)
    for name, report in look.items():
        use = f"{report.codes_used:,} of {tokenizer.vocab_size:,} codes"
        similar = f", SSIM {report.ssim:.3f}" if report.ssim is not None else ""
        say(f"{name}: {report.psnr_db:.2f} dB{similar}, {use}")
    say(f"{out}: finished after {duration(time.monotonic() - began)}")
    return tokenizer


def loop(run: Run, crops: Crops, heldout: Mapping[str, Tensor], metrics: Metrics, out: Path) -> None:
    """Take the steps that are left, look at held-out frames now and then, and save."""
    config, heldout_note = run.config, ""
    with (
        stop_on_signal() as stop,
        Progress("tokenizer", total=config.steps, unit="steps", done=run.step) as progress,
        ThreadPoolExecutor(
            config.parts, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        ) as pool,
    ):
        while run.step < config.steps:
            values = run.advance(crops, pool)
            if run.step % config.report_every == 0:
                metrics.write(run.step, values)
            if run.step % config.evaluate_every == 0 and run.step < config.steps:
                look = evaluate(run.tokenizer(), heldout)
                metrics.write(run.step, flat(look))
                if run.learner.quantised(run.step):
                    warn_of_collapse(look, run.vocab_size, config.collapse_below, run.step, run.learner.remedy)
                heldout_note = ", ".join(
                    f"{name} {report.psnr_db:.2f} dB {report.share_used:.0%} codes" for name, report in look.items()
                )
            progress.advance(note=f"loss {values['train/loss']:.4f}  {heldout_note}")
            if run.step % config.save_every == 0 or run.step == config.steps or stop:
                run.save(out / STATE_FILE)
            if stop and run.step < config.steps:
                what = f"{stop.name} after step {run.step}; everything is saved"
                raise InterruptedRunError(what, where=out, fix="continue with --resume")


def joined_ledger(parts: Mapping[str, Mapping[str, Sequence[LedgerRow]]]) -> list[LedgerRow]:
    """The rows of all sources of both parts; an id becomes PART/SOURCE/ID."""
    return [
        dataclasses.replace(row, id=f"{part}/{name}/{row.id}")
        for part, sources in parts.items()
        for name, rows in sources.items()
        for row in rows
    ]


@contextlib.contextmanager
def threads_for(parts: int) -> Iterator[None]:
    """Share the process's threads out among parts that are computed side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // parts))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def story(run: Run, crops: Crops, look: Mapping[str, ReconstructionReport]) -> dict[str, Any]:
    """What `tokenizer.json` tells of a run, with the figures it reached on the held-out frames."""
    size = run.config.heldout_size
    return {
        "recipe": run.config.name,
        "seed": run.config.seed,
        "steps": run.step,
        "batch": run.config.batch,
        "frames": crops.frames,
        "heldout": {name: {"size": size, **rounded(report)} for name, report in look.items()},
    }


@final
class Run:
    """The state of a training run, and one step of it.

    Attributes:
        step: finished steps.
    """

    def __init__(self, config: TokenizerTrainConfig, device: torch.device):
        if config.batch % config.parts:
            raise ConfigError(f"{config.batch} crops can't be split into {config.parts} equal parts", where="batch")
        self.config, self.device, self.step = config, device, 0
        self.kind = network_kind(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(config.seed, "weights"))
            self.model = self.kind.network(config.model)
            self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.learner = config.method.learner(self.model)
        self.learner.extra.to(device=device)
        self.average: Network = copy.deepcopy(self.model).requires_grad_(False)
        self.parameters = self.learner.parameters
        groups = [{"params": list(module.parameters())} for module in (self.model, self.learner.extra)]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    @property
    def vocab_size(self) -> int:
        """How many codes there are."""
        return int(self.config.model.vocab_size)

    def advance(self, crops: Crops, pool: Executor) -> dict[str, float]:
        """Take one step; returns what metrics say of it."""
        config, moment = self.config, Moment(step=self.step, cooling=cooldown(self.config, self.step) > 0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        pixels = crops.batch(self.step, config.batch, config.cooldown_crops if moment.cooling else config.crops)
        pixels = pixels.to(self.device)

        def part(number: int, some: Tensor) -> Part:
            noise = torch.Generator().manual_seed(integer(config.seed, "noise", self.step, number))
            with autocast(config.precision, self.device):
                return self.learner.part(some, moment, noise)

        parts = list(pool.map(part, range(config.parts), pixels.chunk(config.parts)))
        loss = torch.stack([part.loss for part in parts]).mean()
        for parameter, *gradients in zip(self.parameters, *(part.gradients for part in parts), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0]).div_(len(parts))
        norms = [torch.nn.utils.clip_grad_norm_(group["params"], config.clip) for group in self.optimizer.param_groups]
        self._require_finite(torch.stack([loss, *norms]))
        self.optimizer.step()
        after = self.learner.after(parts, moment, stream(config.seed, "codebook", self.step))
        self._average()
        self.step += 1
        squared = float((torch.cat([part.rebuilt for part in parts]) - pixels).square().mean())
        values = {name: torch.stack([part.values[name] for part in parts]).mean() for name in parts[0].values}
        found = {
            "loss": float(loss),
            "psnr_db": -10 * math.log10(max(squared, 1e-12) / 4),
            "codes_in_batch": float(torch.bincount(torch.cat([part.codes for part in parts])).count_nonzero()),
            "gradient_norm": float(norms[0]),
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            **{name: float(value) for name, value in values.items()},
            **after,
        }
        return {f"train/{name}": value for name, value in found.items()}

    def tokenizer(self, trained: Mapping[str, Any] | None = None) -> NeuralTokenizer:
        """The averaged weights as a tokenizer, rounded as they will be stored."""
        return self.kind.from_model(self.average, trained=trained or {}, device=self.device)

    def save(self, path: Path) -> None:
        """Write the whole state into one file."""
        about = {"step": str(self.step), "config": json.dumps(as_plain(self.config))}
        with written_aside(path) as aside:
            safetensors.torch.save_file(
                {name: value.contiguous() for name, value in self._state().items()}, aside, about
            )

    def restore(self, path: Path) -> None:
        """Go back to a saved state of the same configuration; the end may be moved until the cool-down has begun.

        Raises:
            CheckpointError: the file is damaged.
            ConfigError: it is of another configuration.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
            step, config = int(about["step"]), json.loads(about["config"])
            saved = safetensors.torch.load_file(path)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"trainer's state can't be read ({error})", where=path, fix="start a new run"
            ) from None
        mine = as_plain(self.config)
        if step <= min(config["steps"] - config["cooldown_steps"], self.config.steps - self.config.cooldown_steps):
            config |= {name: mine[name] for name in ("steps", "cooldown_steps")}
        different = sorted(name for name in {*mine, *config} if mine.get(name) != config.get(name))
        if different:
            raise ConfigError(
                f"is a run with another {', '.join(different)}",
                where=path.parent,
                fix="use its recipe or another folder",
            )
        self.step = step
        self._fill_optimizer()
        state = self._state()
        if set(state) != set(saved):
            raise CheckpointError("trainer's state is of another model", where=path, fix="start a new run")
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(saved[name])

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that decides how the run goes on, by name; the tensors themselves, not copies."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        state |= {f"extra.{name}": value for name, value in self.learner.extra.state_dict().items()}
        state |= self.learner.state()
        for name, parameter in (*self.model.named_parameters(), *self.learner.extra.named_parameters("extra")):
            state |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return state

    def _fill_optimizer(self) -> None:
        """Let AdamW make its state, without changing a weight."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights towards the model's; early steps count for more."""
        decay = min(self.config.average_decay, (self.step + 1) / (self.step + 10))
        averages: list[Tensor] = list(self.average.parameters())
        now: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, now, 1 - decay)
        for average, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            average.copy_(buffer)

    def _require_finite(self, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise NonFiniteLossError(
                f"loss and gradient norms are {', '.join(f'{value:.4g}' for value in values)} at step {self.step}",
                fix="lower learning_rate or clip, or use --precision fp32, and continue from the last save",
            )


def network_kind(config: TokenizerTrainConfig) -> type[NeuralTokenizer]:
    """The class of the tokenizer that a configuration trains.

    Raises:
        ConfigError: there is no such kind, it has no network, or the architecture is another kind's.
    """
    kind = tokenizer_class(config.kind, where="kind")
    if not issubclass(kind, NeuralTokenizer):
        raise ConfigError(f"the kind {config.kind!r} has no network to train", where="kind")
    if not isinstance(config.model, kind.architecture):
        wanted = kind.architecture.__name__
        raise ConfigError(f"is a {type(config.model).__name__}, the kind {config.kind} has {wanted}", where="model")
    return kind


def learning_rate(config: TokenizerTrainConfig, step: int) -> float:
    """AdamW's rate at a step: a linear rise, a plateau, and a fall over the cool-down.

    The plateau doesn't depend on where the run ends, so a run can be made longer from any step before its cool-down.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    passed = cooldown(config, step)
    left = 1 - math.sqrt(passed) if config.cooldown == "sqrt" else (1 + math.cos(math.pi * passed)) / 2
    return rise * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left)


def cooldown(config: TokenizerTrainConfig, step: int) -> float:
    """The share of the cool-down that has passed, 0 before it."""
    if not config.cooldown_steps:
        return 0.0
    return max(0, step - (config.steps - config.cooldown_steps)) / config.cooldown_steps
