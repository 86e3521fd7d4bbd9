"""Words of a command line -> a frozen dataclass; what doesn't fit is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Annotated, Any, TypeVar

import tyro

from toto.runtime.errors import ConfigError
from toto.runtime.places import as_path
from toto.training.mixture import MixtureChange
from toto.training.source import SourceConfig

Options = TypeVar("Options")


def options_with(options: type[Options], recipe: Any) -> type[Options]:
    """The options with every value of a recipe beside them, as `recipe`, to be changed one by one."""
    flat = Annotated[type(recipe), tyro.conf.arg(name=""), tyro.conf.SuppressFixed]  # type: ignore[valid-type]
    fields = [("recipe", flat, dataclasses.field(default=recipe))]
    kind = dataclasses.make_dataclass("RecipeOptions", fields, bases=(options,), frozen=True, kw_only=True)
    kind.__doc__ = options.__doc__
    return kind


def parse(kind: type[Options], words: list[str], *, verb: str) -> Options:
    """Parse all words into `kind`; `--help` prints and exits.

    Raises:
        ConfigError: an unknown option, a missing one, or a value that doesn't fit.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, prog=f"toto {verb}", args=words)
    except SystemExit as leave:
        if leave.code in (0, None):
            raise
        raise ConfigError(_condensed(shown.getvalue()), where=f"toto {verb}", fix=f"see `toto {verb} --help`") from None


def take_word(words: list[str], *, verb: str, what: str, known: list[str]) -> tuple[str, list[str]]:
    """The first word, which must be one of the known ones, and the rest; `--help` alone lists them."""
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: toto {verb} {{{','.join(known)}}} ...\n\n`toto {verb} {what} --help` tells more.")
        raise SystemExit(0 if words else 2)
    if words[0] not in known:
        raise ConfigError(
            f"unknown {what.lower()} {words[0]!r}", where=f"toto {verb}", fix=f"known: {', '.join(known)}"
        )
    return words[0], words[1:]


def parse_source(text: str) -> SourceConfig:
    """Read `[image:|video:]FOLDER[=WEIGHT]`.

    >>> parse_source("image:shards/photos=0.2").weight
    0.2
    """
    modality, colon, rest = text.partition(":")
    if not colon or modality not in ("image", "video"):
        modality, rest = "video", text
    folder, weight = parse_weight(rest)
    return SourceConfig(path=as_path(folder), weight=weight, modality="image" if modality == "image" else "video")


def parse_weight(text: str) -> tuple[str, float]:
    """Read `FOLDER[=WEIGHT]`.

    >>> parse_weight("photos=0.2")
    ('photos', 0.2)
    """
    folder, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise ConfigError(f"weight {weight!r} is not a number", where=text, fix="write FOLDER=0.2") from None


def parse_change(
    words: tuple[str, ...], sources: tuple[SourceConfig, ...], *, before: MixtureChange | None
) -> MixtureChange:
    """Read `STEP FOLDER=WEIGHT ...`; sources that aren't named keep the weights they had before."""
    where, example = f"--data-at {' '.join(words)}", "write --data-at 1000 FOLDER=0.2 OTHER=0.8"
    if len(words) < 2 or not words[0].isdecimal():
        raise ConfigError("needs a step and weights", where=where, fix=example)
    weights = list(before.weights) if before else [source.weight for source in sources]
    for text in words[1:]:
        if "=" not in text:
            raise ConfigError(f"{text} has no weight", where=where, fix=example)
        change = parse_source(text)
        same = [n for n, old in enumerate(sources) if (old.path, old.modality) == (change.path, change.modality)]
        if not same:
            raise ConfigError(f"{text} is no source of --data", where=where, fix="add it to --data with =0")
        weights[same[0]] = change.weight
    return MixtureChange(step=int(words[0]), weights=tuple(weights))


def _condensed(box: str) -> str:
    """The message inside tyro's box, drawn with lines or in ASCII, as one line."""
    rows = [row.strip("│╭╮╰╯ ") for row in box.splitlines()]
    sections: list[list[str]] = [[]]
    for row in rows:
        if row and not row.strip("─-"):
            sections.append([])
        elif row and not row.endswith("──"):  # the title, in the box's upper edge
            sections[-1].append(row)
    said = [section for section in sections if section][0 if "│" in box else 1 :]  # in ASCII, the title comes first
    hints = [section for section in said[1:] if section[0].startswith("Perhaps you meant") and len(section) > 1]
    hint = f" (perhaps you meant {hints[0][1].split()[0]})" if hints else ""
    return (" ".join(said[0]).rstrip(".") if said else "the words don't fit") + hint
