"""A pre-training run on paper: parameters, FLOPs, memory on a rank, time and storage, before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from toto.model.baselines.config import MambaConfig
from toto.model.budget.baseline_memory import baseline_memory, memory_is_known
from toto.model.budget.baselines import BaselineConfig, baseline_flops, uncounted_share
from toto.model.budget.flops import Flops, positions_of, training_flops
from toto.model.budget.memory import Checkpointing, Memory, StepShape, training_memory
from toto.model.budget.parameters import parameter_table
from toto.model.config import ModelConfig, note_on, with_patch_values, with_vocabulary
from toto.runtime.errors import ConfigError
from toto.runtime.machine import Machine
from toto.tokens.sequence import sequence_vocabulary
from toto.training.config import TrainConfig
from toto.training.parallel import Strategy, blocks_stay_as_they_are

BYTES_OF_CODE = 2
BYTES_OF_CHECKPOINT = 16  # a weight: itself, for use and to go on from, and two moments


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the data will be, as far as a recipe doesn't say it.

    Attributes:
        codes: size of the tokenizer's vocabulary.
        rows: of a frame's grid.
        cols: of a frame's grid.
        patch_side: pixels, for patch inputs.
    """

    codes: int = 8192
    rows: int = 16
    cols: int = 16
    patch_side: int = 8

    def __post_init__(self) -> None:
        for name in ("codes", "rows", "cols", "patch_side"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"tokens.{name}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is laid over devices.

    Attributes:
        devices: how many take part, a rank each.
        strategy: ddp keeps all weights on each; fsdp divides them among all; hsdp among those of a machine.
        checkpointing: what of a block is kept for the backward pass; see `StepShape`.
    """

    devices: int
    strategy: Strategy = "ddp"
    checkpointing: Checkpointing = "none"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes.

    Attributes:
        parameters: by part.
        passes: forward passes of a rank in a step.
        flops: of a step at full length, over all ranks; causal pairs of positions only.
        recomputed: operations of a step that checkpointing does again.
        total_flops: of the whole run, recomputed ones included.
        memory: of a rank.
        whole_memory: whether `memory` is all of it; of transformers' own scan only weights, gradients and moments are.
        room: bytes that a rank may take.
        tokens: visual tokens of the whole run.
        tokens_a_step: visual tokens of a step.
        step_seconds: of a step at full length.
        hours: of the whole run.
        shard_bytes: of its tokens on disk, if none is seen twice.
        checkpoint_bytes: of one checkpoint.
        disk_bytes: of all checkpoints that lie on disk at a time, one being written included.
        changes: what makes it fit, where it doesn't.
        notes: what is assumed or reconstructed.
    """

    parameters: dict[str, int]
    passes: int
    flops: Flops
    recomputed: int
    total_flops: float
    memory: Memory
    whole_memory: bool
    room: int
    tokens: int
    tokens_a_step: int
    step_seconds: float
    hours: float
    shard_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    changes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is enough; where not all of it is known, for what is."""
        return self.memory.total <= self.room


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything that decides a plan; `model` is the recipe's, with what comes from the data."""

    recipe: TrainConfig
    model: ModelConfig | BaselineConfig
    machine: Machine
    layout: Layout
    tokens: Tokens

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.recipe.precision != "fp32" and self.machine.peak_bf16 > 0

    @property
    def passes(self) -> int:
        """Forward passes of a rank in a step."""
        return self.recipe.batch // (self.layout.devices * self.recipe.micro_batch)

    @property
    def calls_blocks(self) -> bool:
        """Whether the model calls its blocks, so that they can be computed again and gathered one by one."""
        return not isinstance(self.model, MambaConfig) or self.model.calls_blocks

    def sequences(self, frames: int, windows: int) -> tuple[int, int]:
        """As how many sequences of `frames` frames that many windows are read, and what the model is given of each."""
        positions = positions_of(self.model, frames * self.tokens.rows * self.tokens.cols)
        return windows * self.recipe.data.frames // frames, positions


def make_plan(config: TrainConfig, machine: Machine, layout: Layout, tokens: Tokens | None = None) -> Plan:
    """Work a run out.

    Raises:
        ConfigError: the architecture isn't known, the batch can't be divided among the ranks, or the machine hasn't
            got the precision.
    """
    tokens = tokens or Tokens()
    job = _Job(recipe=config, model=_resolved(config, tokens), machine=machine, layout=layout, tokens=tokens)
    _require_possible(job)
    full, executed = _step_flops(job, config.data.frames)
    short_steps = min(config.steps, config.data.short_steps)
    total = executed * (config.steps - short_steps)
    if short_steps:
        total += _step_flops(job, config.data.short_frames)[1] * short_steps
    rate = machine.peak(bf16=job.bf16) * machine.utilisation * layout.devices
    memory, room = _memory(job), int(machine.memory * machine.usable)
    parameters = parameter_table(job.model)
    tokens_a_step = config.batch * config.data.frames * tokens.rows * tokens.cols
    stored = BYTES_OF_CODE + (job.model.values_in_patch if job.model.inputs == "patches" else 0)
    checkpoint = BYTES_OF_CHECKPOINT * parameters["total"]
    return Plan(
        parameters=parameters,
        passes=job.passes,
        flops=full,
        recomputed=executed - full.total,
        total_flops=float(total),
        memory=memory,
        whole_memory=isinstance(job.model, ModelConfig) or memory_is_known(job.model),
        room=room,
        tokens=config.steps * tokens_a_step,
        tokens_a_step=tokens_a_step,
        step_seconds=executed / rate,
        hours=total / rate / 3600,
        shard_bytes=stored * config.steps * tokens_a_step,
        checkpoint_bytes=checkpoint,
        disk_bytes=(config.keep + 1) * checkpoint,
        changes=() if memory.total <= room else tuple(_changes(job, room)),
        notes=tuple(_notes(job)),
    )


def _resolved(config: TrainConfig, tokens: Tokens) -> ModelConfig | BaselineConfig:
    """The architecture with what comes from the data."""
    model = config.model
    if not isinstance(model, ModelConfig | BaselineConfig):
        raise ConfigError(f"plans are for toto's decoder and the baselines, this is {model.kind}", where="toto plan")
    model = with_vocabulary(model, model.vocab_size or sequence_vocabulary(tokens.codes))
    if isinstance(model, ModelConfig) and model.inputs == "patches":
        model = with_patch_values(model, model.patch_values or 3 * tokens.patch_side**2)
    return model


def _require_possible(job: _Job) -> None:
    """Refuse a precision that the machine hasn't got, and what can't be done with the batch or the blocks."""
    recipe, devices = job.recipe, job.layout.devices
    if job.layout.checkpointing != "none" and not job.calls_blocks:
        raise blocks_stay_as_they_are(job.model.kind)
    if recipe.precision == "bf16" and not job.machine.peak_bf16:
        raise ConfigError(f"{job.machine.name} has no fast bf16", where="--precision bf16", fix="use auto or fp32")
    if devices < 1:
        raise ConfigError(f"must be at least 1, is {devices}", where="--gpus")
    if job.layout.strategy == "hsdp" and devices % job.machine.devices:
        raise ConfigError(
            f"{devices} are not whole machines of {job.machine.devices}",
            where="--gpus",
            fix=f"use a multiple of {job.machine.devices}, or fsdp",
        )
    if recipe.batch % (devices * recipe.micro_batch):
        smaller = [n for n in range(1, recipe.micro_batch) if recipe.batch % (devices * n) == 0]
        raise ConfigError(
            f"{recipe.batch} sequences are no multiple of {devices} ranks x {recipe.micro_batch}",
            where="--batch",
            fix=f"use --micro-batch {smaller[-1]}" if smaller else "use fewer ranks or another batch",
        )


def _step_flops(job: _Job, frames: int) -> tuple[Flops, int]:
    """Operations of a step of sequences of this many frames, and all that are executed.

    Full checkpointing runs blocks forward once more; the selective one keeps what products and attention gave.
    """
    batch, positions = job.sequences(frames, job.recipe.batch)
    model = job.model
    if isinstance(model, ModelConfig):
        flops = training_flops(model, batch=batch, positions=positions)
    else:
        flops = baseline_flops(model, batch=batch, positions=positions)
    blocks = sum(count for part, count in flops.forward.items() if part not in ("output", "patches"))
    return flops, flops.total + (blocks if job.layout.checkpointing == "full" else 0)


def _memory(job: _Job) -> Memory:
    """Of the fullest step: short sequences have more start ids."""
    model, data, layout = job.model, job.recipe.data, job.layout
    shape = StepShape(
        batch=1,
        positions=1,
        bf16=job.bf16,
        accumulates=job.passes > 1 or (layout.strategy == "ddp" and layout.devices > 1),  # its buckets stay
        shards={"ddp": 1, "fsdp": layout.devices, "hsdp": job.machine.devices}[layout.strategy],
        checkpointing=layout.checkpointing,
        fused_norm=job.machine.fused_norm,
    )
    found = []
    for frames in (data.frames, data.short_frames) if data.short_steps else (data.frames,):
        batch, positions = job.sequences(frames, job.recipe.micro_batch)
        read = replace(shape, batch=batch, positions=positions)
        found.append(training_memory(model, read) if isinstance(model, ModelConfig) else baseline_memory(model, read))
    return max(found, key=lambda memory: memory.total)


@dataclass(frozen=True, kw_only=True)
class _Change:
    """One option with another value, and the fields of the recipe or layout that it sets."""

    words: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)

    def applied(self, job: _Job) -> _Job:
        """The job with this change."""
        return replace(job, recipe=replace(job.recipe, **self.recipe), layout=replace(job.layout, **self.layout))


def _changes(job: _Job, room: int) -> Iterator[str]:
    """Options each of which makes it fit, in its mildest value; where none does, several of them together."""
    micro, more = job.recipe.micro_batch, job.layout.devices > 1
    shards = [_Change(words="--parallel.strategy fsdp", layout={"strategy": "fsdp"})] if more else []
    again = [
        _Change(words=f"--parallel.checkpointing {kept}", layout={"checkpointing": kept})
        for kept in ("selective", "full")
        if job.calls_blocks
    ]
    smaller = [
        _Change(words=f"--micro-batch {n}", recipe={"micro_batch": n})
        for n in range(micro - 1, 0, -1)
        if micro % n == 0
    ]
    options = [values for values in (shards, again, smaller) if values]
    enough = [
        next((change.words for change in values if _memory(change.applied(job)).total <= room), "")
        for values in options
    ]
    if any(enough):
        yield from filter(None, enough)
        return
    words: list[str] = []
    for strongest in (values[-1] for values in options):
        words.append(strongest.words)
        job = strongest.applied(job)
        if _memory(job).total <= room:
            yield " ".join(words)
            return
    wider = "more --gpus with --parallel.strategy fsdp, " if job.machine.devices > 1 else ""
    yield f"{wider}a smaller model, shorter sequences, or more memory"


def _notes(job: _Job) -> Iterator[str]:
    """What the figures rest on."""
    machine, tokens = job.machine, job.tokens
    yield (
        f"{machine.name}: {machine.peak(bf16=job.bf16):.3g} FLOP/s in {'bf16' if job.bf16 else 'fp32'}, of which a step"
        f" reaches {machine.utilisation:.0%}, communication included; {machine.memory / 1e9:.3g} GB, of which"
        f" {machine.usable:.0%} for tensors ({machine.source})"
    )
    frames = job.recipe.data.frames
    yield f"tokens: {job.model.vocabulary:,} ids, {tokens.rows} x {tokens.cols} codes a frame, {frames} frames"
    if job.model.kind != "mamba":
        yield "attention: only pairs of positions that may attend are counted; all pairs would be nearly twice as many"
    if job.layout.strategy != "ddp":
        gathered = (
            "two blocks gathered at a time, one with its gradient" if job.calls_blocks else "all weights gathered"
        )
        yield f"sharded memory: {gathered}; worked out, not measured"
    if not isinstance(job.model, ModelConfig):
        yield from _notes_on_baseline(job, job.model)
        return
    if machine.fused_norm:
        yield "RMSNorm as one kernel that keeps its input only; worked out, not measured"
    if note := note_on(job.model):
        yield note


def _notes_on_baseline(job: _Job, model: BaselineConfig) -> Iterator[str]:
    if not memory_is_known(model):
        yield "memory: weights, gradients and moments alone; what transformers' scan keeps isn't known"
    elif job.machine.fused_norm:
        yield f"memory of {model.kind}'s blocks on a GPU: worked out, not measured"
    if share := uncounted_share(model):
        yield f"the scan's operations, element by element, aren't counted: {share:.1%} of those of the forward pass"
