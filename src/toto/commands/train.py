"""`toto train RECIPE --out RUN --data SHARDS`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from toto.commands.parsing import parse, parse_change, parse_source, take_word
from toto.evaluation.likelihood import heldout_evaluation
from toto.recipes import PRETRAINING
from toto.runtime.metrics import read_metrics
from toto.training.config import TrainConfig
from toto.training.loop import train
from toto.training.mixture import MixtureChange


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
    """

    out: Path
    data: tuple[str, ...]
    data_at: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    heldout: tuple[str, ...] = ()
    resume: bool = False


def options_with(recipe: TrainConfig) -> type[Options]:
    """The options with every value of the recipe beside them, to be changed one by one."""
    flat = Annotated[TrainConfig, tyro.conf.arg(name=""), tyro.conf.SuppressFixed]
    kind = dataclasses.make_dataclass(
        "RecipeOptions",
        [("recipe", flat, dataclasses.field(default=recipe))],
        bases=(Options,),
        frozen=True,
        kw_only=True,
    )
    kind.__doc__ = Options.__doc__
    return kind


def run(words: list[str]) -> None:
    """Parse, train, and print where the model is and what it reached."""
    name, rest = take_word(words, verb="train", what="RECIPE", known=list(PRETRAINING))
    options = parse(options_with(PRETRAINING[name]()), rest, verb=f"train {name}")
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
    last = train(config, options.out, evaluate=evaluate, resume=options.resume)
    final = {name: value for row in read_metrics(options.out)[-2:] for name, value in row.items()}
    print(f"{last}: " + ", ".join(f"{name} {value:.4g}" for name, value in final.items()))
