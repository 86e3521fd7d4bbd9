"""Values of particular experiments: functions that return frozen configurations.

Each recipe is headed by its command, its cost and the result to expect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

from toto.recipes import pretraining, tokenizer
from toto.runtime.errors import ConfigError
from toto.training.config import TrainConfig
from toto.training.tokenizer import TokenizerTrainConfig

PRETRAINING: dict[str, Callable[[], TrainConfig]] = {
    "demo": pretraining.demo,
    "nano": pretraining.nano,
    "base": pretraining.base,
    "large": pretraining.large,
    "1b": pretraining.one_b,
    "table3-tokens": pretraining.table3_tokens,
    "table3-patch-patch": pretraining.table3_patch_patch,
    "table3-patch-dvae": pretraining.table3_patch_dvae,
}

TOKENIZERS: dict[str, Callable[[], TokenizerTrainConfig]] = {
    "embedded": tokenizer.embedded,
    "fsq": tokenizer.fsq,
    "dvae-small": tokenizer.dvae_small,
    "vqgan-small": tokenizer.vqgan_small,
    "dvae": tokenizer.dvae,
    "vqgan-1k": tokenizer.vqgan,
    "vqgan-16k": partial(tokenizer.vqgan, 16384),
}

ENTRY_POINTS = "toto.tokenizer_recipes"


def tokenizer_recipes() -> list[str]:
    """Names of toto's own tokenizer recipes, and of those that other distributions registered."""
    return [*TOKENIZERS, *(entry.name for entry in entry_points(group=ENTRY_POINTS) if entry.name not in TOKENIZERS)]


def tokenizer_recipe(name: str) -> TokenizerTrainConfig:
    """A tokenizer recipe by name: toto's own, or an entry point of the group `toto.tokenizer_recipes`.

    Raises:
        ConfigError: nobody knows it, or what is registered is no recipe.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            recipe = entry.load()()
        except (ImportError, AttributeError, TypeError) as error:
            raise ConfigError(f"{entry.value} gives no recipe ({error})", where=name, fix="mend its package") from None
        if isinstance(recipe, TokenizerTrainConfig):
            return recipe
        raise ConfigError(f"{entry.value} gives no recipe of a tokenizer", where=name, fix="mend its package")
    raise ConfigError(f"unknown recipe {name!r}", where="toto tokenizer train", fix=", ".join(tokenizer_recipes()))
