"""`toto train RECIPE --out RUN --data SHARDS`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from toto.commands.parsing import options_with, parse, parse_change, parse_source, take_word
from toto.evaluation.likelihood import heldout_evaluation
from toto.media.ledger import summary
from toto.recipes import PRETRAINING
from toto.report.losses import loss_lines, write_losses
from toto.runtime.allocator import keep_freed_memory
from toto.runtime.files import write_json
from toto.runtime.metrics import read_metrics
from toto.runtime.ranks import is_first
from toto.runtime.wandb_sink import parse_project
from toto.tokens.accounts import count_inputs
from toto.tokens.shards import LEDGER, TokenStore
from toto.training.config import DataConfig, TrainConfig
from toto.training.loop import train
from toto.training.mixture import MixtureChange

INPUTS = "inputs.json"  # of a run: what became of the inputs of its shards


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pre-train a model on shards; `--resume` continues a run.

    Attributes:
        out: the run's folder.
        data: what is trained on, [image:|video:]FOLDER[=WEIGHT]; several make a mixture.
        data_at: STEP and new weights from this step on, [image:|video:]FOLDER=WEIGHT; a source that isn't named keeps
            its weight. Give it again for a further step. A source that joins later has weight 0 in --data.
        heldout: what is evaluated on, in the same form.
        resume: continue the run in OUT from its newest checkpoint, exactly.
        wandb: [TEAM/]PROJECT of Weights & Biases that shows the metrics, too (extra wandb).
    """

    out: Path
    data: tuple[str, ...]
    data_at: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    heldout: tuple[str, ...] = ()
    resume: bool = False
    wandb: str | None = None


def count_all_inputs(data: DataConfig) -> list[dict[str, Any]]:
    """What became of the inputs of every source: those whose videos are shorter than T are short here."""
    return [
        {
            "part": part,
            "path": str(source.path),
            "modality": source.modality,
            "ledger": count_inputs(
                TokenStore(source.path), source.modality, least=data.frames if source.modality == "video" else 1
            ),
            "rows": f"{source.path}/{LEDGER}",
        }
        for part, sources in (("train", data.sources), ("heldout", data.heldout))
        for source in sources
    ]


def run(words: list[str]) -> None:
    """Parse, train, and print where the model is and what it reached."""
    name, rest = take_word(words, verb="train", what="RECIPE", known=list(PRETRAINING))
    options = parse(options_with(Options, PRETRAINING[name]()), rest, verb=f"train {name}")
    recipe: TrainConfig = vars(options)["recipe"]
    sources = tuple(parse_source(text) for text in options.data)
    schedule: list[MixtureChange] = []
    for change in options.data_at:
        schedule.append(parse_change(change, sources, before=schedule[-1] if schedule else None))
    data = dataclasses.replace(
        recipe.data,
        sources=sources,
        schedule=tuple(schedule),
        heldout=tuple(parse_source(text) for text in options.heldout),
    )
    config = dataclasses.replace(recipe, data=data)
    evaluate = heldout_evaluation(config) if data.heldout else None
    keep_freed_memory()
    project = None if options.wandb is None else parse_project(options.wandb)
    last = train(config, options.out, evaluate=evaluate, resume=options.resume, wandb=project)
    if not is_first():
        return
    final = {name: value for row in read_metrics(options.out)[-2:] for name, value in row.items()}
    inputs = count_all_inputs(data)
    write_json(options.out / INPUTS, inputs)
    for each in inputs:
        print(f"{each['part']} {each['modality']}:{each['path']}: {summary(each['ledger'], each['rows'])}")
    print(f"{last}: " + ", ".join(f"{name} {value:.4g}" for name, value in final.items()))
    print("\n".join(loss_lines(write_losses(options.out))))
