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
from toto.recipes import tokenizer_recipe, tokenizer_recipes
from toto.runtime.errors import ConfigError
from toto.training.tokenizer import TokenizerTrainConfig, train_tokenizer
from toto.training.tokenizer_data import Source

FIXED = ("name", "kind", "sources", "heldout")  # of a recipe: not for options of their own names


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a tokenizer by a recipe; the same command with --resume continues it.

    Attributes:
        out: the tokenizer's folder.
        data: folders of images and videos to train on instead of the recipe's, FOLDER[=SHARE].
        heldout: folders to look at while it trains, instead of the recipe's.
        data_stride: every so manieth frame of the videos in these folders.
        resume: continue the run in OUT, exactly.
        device: auto, cpu, cuda, ...
    """

    out: Path
    data: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
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
    if options.data:
        changed["sources"] = sources(options.data, options.data_stride)
    if options.heldout:
        changed["heldout"] = sources(options.heldout, options.data_stride)
    config = dataclasses.replace(recipe, **changed)
    train_tokenizer(config, out=options.out, resume=options.resume, device=options.device)


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


def sources(folders: tuple[str, ...], stride: int) -> tuple[Source, ...]:
    """Read `FOLDER[=SHARE]` words.

    >>> sources(("photos=0.2",), 4)[0].share
    0.2
    """
    if stride < 1:
        raise ConfigError(f"must be at least 1, is {stride}", where="--data-stride")
    found = []
    for text in folders:
        folder, weight = parse_weight(text)
        if not weight > 0:
            raise ConfigError(f"share {weight:g} is not positive", where=text, fix="leave the folder out")
        found.append(Source(name=Path(folder).name or folder, where=folder, stride=stride, share=weight))
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"folders of the same name ({', '.join(names)})", where="--data", fix="rename one")
    return tuple(found)
