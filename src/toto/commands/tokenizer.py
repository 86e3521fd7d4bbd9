"""`toto tokenizer train RECIPE --out FOLDER`, `toto tokenizer import --kind KIND ...` and `toto tokenizer inspect`."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from toto.commands import import_tokenizer, inspect_tokenizer
from toto.commands.parsing import parse, parse_weight, take_word
from toto.media.catalogs import recognise, takes_clips, takes_column
from toto.media.ledger import count_by_status, summary, unused
from toto.recipes import tokenizer_recipe, tokenizer_recipes
from toto.runtime.errors import ConfigError
from toto.runtime.places import AnyPath
from toto.tokens.shards import LEDGER, read_ledger
from toto.training.tokenizer import TokenizerTrainConfig, train_tokenizer
from toto.training.tokenizer_data import SAMPLE, Source

FIXED = ("name", "kind", "sources", "heldout")  # of a recipe: not for options of their own names


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a tokenizer by a recipe; the same command with --resume continues it.

    Attributes:
        out: the tokenizer's folder.
        data: images and videos to train on instead of the recipe's, SOURCE[=SHARE]; a source is whatever
            `toto tokenize` reads.
        clips: the folder that holds what the manifests among them name; by default each manifest's own.
        split: train on this split alone.
        image_column: of the parquet files among them, the column with the bytes of images or videos; by default one
            with a usual name.
        heldout: what to look at while it trains, instead of the recipe's.
        heldout_clips: the same for the held-out sources; by default --clips.
        heldout_image_column: the same for the held-out sources; by default --image-column.
        heldout_split: look at this split, of the held-out sources or, where there are none, of DATA.
        data_stride: every so manieth frame of the videos.
        resume: continue the run in OUT, exactly.
        device: auto, cpu, cuda, ...
    """

    out: Path
    data: tuple[str, ...] = ()
    clips: AnyPath | None = None
    split: str | None = None
    image_column: str | None = None
    heldout: tuple[str, ...] = ()
    heldout_clips: AnyPath | None = None
    heldout_image_column: str | None = None
    heldout_split: str | None = None
    data_stride: int = 4
    resume: bool = False
    device: str = "auto"


def run(words: list[str]) -> None:
    """Train, import or inspect."""
    task, rest = take_word(words, verb="tokenizer", what="TASK", known=["train", "import", "inspect"])
    if task == "train":
        train(rest)
    elif task == "import":
        import_tokenizer.run(rest)
    else:
        inspect_tokenizer.run(rest)


def train(words: list[str]) -> None:
    """Train by a recipe, given as the first word or as --recipe NAME."""
    if words[:1] == ["--recipe"]:
        words = words[1:]
    name, rest = take_word(words, verb="tokenizer train", what="RECIPE", known=tokenizer_recipes())
    recipe = tokenizer_recipe(name)
    options = parse(options_with(recipe), rest, verb=f"tokenizer train {name}")
    changed = {field.name: getattr(options.recipe, field.name) for field in dataclasses.fields(options.recipe)}
    changed |= named_sources(options)
    config = dataclasses.replace(recipe, **changed)
    train_tokenizer(config, out=options.out, resume=options.resume, device=options.device)
    rows, stored = read_ledger(options.out), options.out / LEDGER
    print("\n".join([summary(count_by_status(rows), stored), *unused(rows, rest_in=stored)]))


def named_sources(options: TrainOptions) -> dict[str, tuple[Source, ...]]:
    """The sources that the options name; a recipe's own stay where none is named.

    Raises:
        ConfigError: clips or a split are named for a recipe's own frames, or it would look at what it trains on.
    """
    if not options.data and (options.clips or options.split or options.image_column):
        where = "--clips, --split or --image-column"
        raise ConfigError("names no source of its own", where=where, fix="give --data")
    if not options.heldout and (options.heldout_clips or options.heldout_image_column or options.heldout_split):
        if not options.data or options.heldout_clips or options.heldout_image_column:
            where = "--heldout-image-column" if options.heldout_image_column else "--heldout-clips"
            raise ConfigError("names no source of its own", where=where, fix="give --heldout")
        if options.split is None:
            raise ConfigError("would train on the split it looks at", where="--heldout-split", fix="name --split, too")
    found = {}
    if options.data:
        found["sources"] = sources(
            options.data,
            options.data_stride,
            clips=options.clips,
            split=options.split,
            image_column=options.image_column,
        )
    if options.heldout or options.heldout_split:
        found["heldout"] = sources(
            options.heldout or options.data,
            options.data_stride,
            clips=options.heldout_clips or options.clips,
            split=options.heldout_split,
            image_column=options.heldout_image_column or options.image_column,
        )
    return found


def options_with(recipe: TokenizerTrainConfig) -> type[Any]:
    """The options with every value of the recipe beside them, to be changed one by one."""
    hints = typing.get_type_hints(TokenizerTrainConfig)
    fields: list[Any] = []
    for field in dataclasses.fields(recipe):
        if field.name not in FIXED:
            value = getattr(recipe, field.name)
            kind = type(value) if dataclasses.is_dataclass(value) else hints[field.name]
            fields.append((field.name, kind, dataclasses.field(default=value)))
    values = dataclasses.make_dataclass("Recipe", fields, frozen=True, kw_only=True)
    values.__doc__ = TokenizerTrainConfig.__doc__
    flat = Annotated[values, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    kind = dataclasses.make_dataclass(
        "RecipeOptions",
        [("recipe", flat, dataclasses.field(default=values()))],
        bases=(TrainOptions,),
        frozen=True,
        kw_only=True,
    )
    kind.__doc__ = TrainOptions.__doc__
    return kind


def sources(
    words: tuple[str, ...],
    stride: int,
    *,
    clips: AnyPath | None = None,
    split: str | None = None,
    image_column: str | None = None,
) -> tuple[Source, ...]:
    """Read `SOURCE[=SHARE]` words; `clips` goes to those that name clips elsewhere, the column to parquet files."""
    if stride < 1:
        raise ConfigError(f"must be at least 1, is {stride}", where="--data-stride")
    found = []
    for text in words:
        where, weight = parse_weight(text)
        if not weight > 0:
            raise ConfigError(f"share {weight:g} is not positive", where=text, fix="leave the folder out")
        embedded = where.startswith(SAMPLE)
        name = (Path(where) if embedded else recognise(where).path).name or where
        known = clips if clips and not embedded and takes_clips(where) else None
        column = image_column if not embedded and takes_column(where, "image_column") else None
        found.append(
            Source(
                name=name,
                where=where,
                stride=stride,
                share=weight,
                clips=known,
                split=split,
                image_column=column,
            )
        )
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"folders of the same name ({', '.join(names)})", where="--data", fix="rename one")
    return tuple(found)
