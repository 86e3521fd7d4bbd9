"""`toto plan RECIPE`: what a run takes, on paper."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from toto.commands.parsing import options_with, parse, take_word
from toto.recipes import PRETRAINING
from toto.runtime.errors import ConfigError
from toto.runtime.machine import Machine, machine
from toto.runtime.provenance import as_plain
from toto.training.config import TrainConfig
from toto.training.plan import Layout, Plan, Tokens, make_plan


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run takes: parameters, FLOPs, memory of a rank, hours, storage. Ends with 1 where it doesn't fit.

    Attributes:
        machine: h100, a100, this (measured now), or a JSON file; what is assumed of it is printed.
        gpus: devices that take part, a rank each; by default those of one machine that the
            batch can be divided among.
        codes: of the tokenizer.
        grid: rows and columns of a frame's tokens.
        patch_side: pixels of a patch, for patch inputs.
        dollars_per_hour: of one device; gives the run's price.
        json: print one JSON object.
    """

    machine: str = "h100"
    gpus: int | None = None
    codes: int = 8192
    grid: tuple[int, int] = (16, 16)
    patch_side: int = 8
    dollars_per_hour: float | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.dollars_per_hour is not None and not self.dollars_per_hour > 0:
            raise ConfigError(f"must be positive, is {self.dollars_per_hour}", where="--dollars-per-hour")


def run(words: list[str]) -> bool:
    """Parse, work it out and print it; returns whether it doesn't fit."""
    name, rest = take_word(words, verb="plan", what="RECIPE", known=list(PRETRAINING))
    options = parse(options_with(Options, PRETRAINING[name]()), rest, verb=f"plan {name}")
    recipe: TrainConfig = vars(options)["recipe"]
    kind = machine(options.machine)
    devices = _devices(recipe, kind) if options.gpus is None else options.gpus
    parallel = recipe.parallel
    layout = Layout(devices=devices, strategy=parallel.strategy, checkpointing=parallel.checkpointing)
    rows, cols = options.grid
    tokens = Tokens(codes=options.codes, rows=rows, cols=cols, patch_side=options.patch_side)
    plan = make_plan(recipe, kind, layout, tokens)
    if options.json:
        print(json.dumps(_record(name, plan, kind, layout, tokens, options.dollars_per_hour), indent=2))
    else:
        print("\n".join(_lines(name, recipe, plan, kind, layout, options.dollars_per_hour)))
    return not plan.fits


def _devices(recipe: TrainConfig, kind: Machine) -> int:
    """All devices of one machine, or as many of them as the batch can be divided among."""
    return max(n for n in range(1, kind.devices + 1) if n == 1 or recipe.batch % (n * recipe.micro_batch) == 0)


def _record(
    name: str, plan: Plan, kind: Machine, layout: Layout, tokens: Tokens, price: float | None
) -> dict[str, Any]:
    """The plan for a program; bytes, FLOPs, seconds and hours."""
    more = {"memory_total": plan.memory.total, "fits": plan.fits, "device_hours": plan.hours * layout.devices}
    if price is not None:
        more["dollars"] = plan.hours * layout.devices * price
    given = {"recipe": name, "machine": kind, "layout": layout, "data": tokens}
    return {key: as_plain(value) for key, value in (given | as_plain(plan) | more).items()}


def _lines(name: str, recipe: TrainConfig, plan: Plan, kind: Machine, layout: Layout, price: float | None) -> list[str]:
    """The plan for a person."""
    parts = ", ".join(f"{part} {count / 1e6:.2f}M" for part, count in plan.parameters.items() if part != "total")
    forward = sum(plan.flops.forward.values())
    shares = ", ".join(f"{part} {count / forward:.0%}" for part, count in plan.flops.forward.items())
    lines = [
        f"{name} on {layout.devices} x {kind.name}, {layout.strategy}, checkpointing {layout.checkpointing}",
        "",
        f"parameters   {plan.parameters['total'] / 1e6:.2f}M ({parts})",
        f"batch        {recipe.batch} sequences = ranks {layout.devices} x passes {plan.passes}"
        f" x micro-batch {recipe.micro_batch}",
        f"tokens       {_counted(plan.tokens)} in {recipe.steps:,} steps of {plan.tokens_a_step:,}",
        f"FLOPs        {plan.flops.total:.4g} a step (forward {forward:.4g}: {shares}), {plan.total_flops:.4g} in all",
    ]
    if plan.recomputed:
        lines.append(f"             of a step, {plan.recomputed:.4g} more to compute blocks again; in the sum")
    least, fullest = ("", f"fullest {_moment(plan)}") if plan.whole_memory else ("at least ", "activations not known")
    lines.append(f"memory       {least}{_size(plan.memory.total)} a rank of {_size(plan.room)}, {fullest}")
    taken = {category: count for category, count in plan.memory.by_category().items() if count}
    lines += [f"             {category:<12}{_size(count):>10}" for category, count in taken.items()]
    lines.append(
        f"time         {_duration(plan.hours)} at {plan.step_seconds:.4g} s a step,"
        f" {plan.tokens_a_step / plan.step_seconds:,.0f} tokens/s; {plan.hours * layout.devices:,.0f} device hours"
    )
    if price is not None:
        lines.append(f"price        {plan.hours * layout.devices * price:,.0f} dollars at {price:g} a device hour")
    lines.append(
        f"storage      shards {_size(plan.shard_bytes)} if no token is seen twice; checkpoints"
        f" {_size(plan.checkpoint_bytes)} each, {_size(plan.disk_bytes)} for {recipe.keep} and one being written"
    )
    lines += ["", *(f"* {note}" for note in plan.notes)]
    if not plan.fits:
        lines += ["", f"does not fit: {_size(plan.memory.total - plan.room)} too much. What fits:"]
        lines += [f"  {change}" for change in plan.changes]
    return lines


def _moment(plan: Plan) -> str:
    """When the memory is fullest, as words."""
    moment = plan.memory.moment
    if moment == "loss":
        return "at the loss"
    return "at the end of the backward pass" if moment == "end" else f"in the backward pass of the {moment}"


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(2_500_000_000)
    '2.50 GB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"


def _counted(tokens: int) -> str:
    """A number of tokens for people.

    >>> _counted(1_048_576_000_000)
    '1.05 T'
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:.2f} {unit}"
    return f"{tokens:,}"


def _duration(hours: float) -> str:
    """Hours for people.

    >>> _duration(50.0)
    '50.0 hours (2.1 days)'
    """
    if hours >= 48:
        return f"{hours:,.1f} hours ({hours / 24:,.1f} days)"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
