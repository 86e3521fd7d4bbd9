"""`toto study NAME`: several models pre-trained and read out alike, in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from toto.commands.finetune import Options as FinetuneOptions
from toto.commands.finetune import labelled
from toto.commands.parsing import options_with, parse, parse_source, take_word
from toto.evaluation.finetune import RESULT, finetune
from toto.evaluation.finetune_config import FinetuneConfig
from toto.evaluation.result import Metric, Result, load_result
from toto.model.weights import load_card, load_config, newest_checkpoint
from toto.recipes import STUDIES
from toto.recipes.studies import Arm, ResolutionStudy, arms
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError
from toto.runtime.files import write_json
from toto.runtime.places import AnyPath
from toto.runtime.progress import say
from toto.runtime.provenance import as_plain, versions, write_provenance
from toto.tokens.sequence import sequence_vocabulary
from toto.tokens.shards import TokenStore
from toto.tokens.tokenizer import EMBEDDED, load_tokenizer
from toto.training.loop import train
from toto.training.source import SourceConfig

TABLE = "study.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pre-train the models of a study, read them out, and print one table. The same command continues it.

    Attributes:
        coarse: shards at the coarse grid, [image:|video:]FOLDER.
        fine: shards of the same images at the fine grid.
        data: labelled items that the read-outs are trained on, in any form that `toto tokenize` reads.
        out: the study's folder: a run and a read-out for each model, and study.json.
        clips: the folder that holds what a manifest names.
        split: train on this split alone.
        image_column: of parquet files, the column with the bytes of images or videos; by default one with a usual name.
        label_column: of parquet files and CSVs, the column with the labels; by default one with a usual name.
        test: what is tested on; without it and without --test-split, a share of DATA is held back.
        test_split: test on this split, of TEST or of DATA.
        limit: train on so many items of each class at most, and test on so many.
        tokenizer: "embedded", or a tokenizer folder.
    """

    coarse: str
    fine: str
    data: str
    out: Path
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    test: str | None = None
    test_split: str | None = None
    limit: int | None = None
    tokenizer: str = EMBEDDED


def run(words: list[str]) -> None:
    """Parse, pre-train what isn't there yet, read out, and print the table."""
    name, rest = take_word(words, verb="study", what="NAME", known=list(STUDIES))
    options = parse(options_with(Options, STUDIES[name]()), rest, verb=f"study {name}")
    study: ResolutionStudy = vars(options)["recipe"]
    coarse, fine = parse_source(options.coarse), parse_source(options.fine)
    stores = TokenStore(coarse.path), TokenStore(fine.path)
    stores[0].passport.require_tokenizer(
        stores[1].passport, where=str(fine.path), fix="tokenize both with one tokenizer"
    )
    grids = _grid(stores[0]), _grid(stores[1])
    if math.prod(grids[1]) <= math.prod(grids[0]):
        what = "has {} x {} codes, no more than the {} x {} of --coarse".format(*grids[1], *grids[0])
        raise ConfigError(what, where=f"--fine {options.fine}", fix="tokenize at a larger --size")
    vocabulary = sequence_vocabulary(stores[0].passport.vocab_size)
    found = arms(study, vocabulary=vocabulary, coarse=grids[0], fine=grids[1])
    write_provenance(options.out, study)
    rows = []
    for arm in found:
        _pretrain(arm, fine if arm.fine else coarse, options.out)
        result = _read_out(arm, study.read_out, options)
        rows.append(_row(arm, options.out, result))
    write_json(options.out / TABLE, {"study": name, "arms": rows, "recipe": as_plain(study), "versions": versions()})
    _print(name, rows)


def _grid(store: TokenStore) -> tuple[int, int]:
    if store.passport.grid is None:
        raise ConfigError("its passport names no grid", where=store.folder, fix="make it with `toto tokenize`")
    return store.passport.grid


def _pretrain(arm: Arm, source: SourceConfig, out: Path) -> None:
    """Train an arm's model, or go on where it was stopped."""
    folder = out / arm.name
    init = None if arm.begins_with is None else str(out / arm.begins_with)
    config = replace(arm.config, data=replace(arm.config.data, sources=(source,)), init=init)
    newest = newest_checkpoint(folder)
    if newest is not None and load_card(newest).training.get("step") == config.steps:
        say(f"{arm.name}: pre-trained already")
        return
    say(f"{arm.name}: {config.steps} steps, {arm.flops:.3g} FLOPs in all")
    train(config, folder, resume=newest is not None)


def _read_out(arm: Arm, config: FinetuneConfig, options: Options) -> Result:
    folder = options.out / f"{arm.name}-read-out"
    if (folder / RESULT).exists():
        return load_result(folder / RESULT)
    asked = FinetuneOptions(
        checkpoint=str(options.out / arm.name),
        data=options.data,
        out=folder,
        clips=options.clips,
        split=options.split,
        image_column=options.image_column,
        label_column=options.label_column,
        test=options.test,
        test_split=options.test_split,
        limit=options.limit,
        tokenizer=options.tokenizer,
    )
    items, test = labelled(asked, config)
    return finetune(
        config,
        folder,
        checkpoint=asked.checkpoint,
        tokenizer=load_tokenizer(options.tokenizer, device=pick_device(config.device)),
        train=items,
        test=test,
        resume=folder.exists(),
    )


def _row(arm: Arm, out: Path, result: Result) -> dict[str, Any]:
    card = load_card(out / arm.name)
    config: Any = load_config(out / arm.name)
    return {
        "arm": arm.name,
        "grid": [card.sequence["rows"], card.sequence["cols"]],
        "rope_base": config.rope_base,
        "steps": arm.config.steps,
        "flops": arm.flops,
        "layer": result.protocol["layer"],
        "top1": as_plain(result.metrics["top1"]),
        "evaluated": result.evaluated,
        "failed": result.failed,
        "model_sha256": result.model_sha256,
    }


def _print(name: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{name}: frozen read-out of the best layer, 95 % bootstrap intervals")
    for heading in ("model", "grid", "RoPE base", "steps", "FLOPs", "layer", "top-1"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        metric = Metric(**row["top1"])
        interval = f"[{100 * (metric.low or 0):.1f}, {100 * (metric.high or 0):.1f}]"
        table.add_row(
            row["arm"],
            "x".join(map(str, row["grid"])),
            f"{row['rope_base']:,.0f}",
            f"{row['steps']:,}",
            f"{row['flops']:.3g}",
            str(row["layer"]),
            f"{100 * metric.value:.1f} {interval}",
        )
    Console().print(table)
