"""Values of particular experiments: functions that return frozen configurations.

Each recipe is headed by its command, its cost and the result to expect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points

from toto.evaluation.finetune_config import FinetuneConfig
from toto.model.config import SCALING
from toto.recipes import baselines, continuing, pretraining, recognition, studies, tokenizer
from toto.recipes.studies import ResolutionStudy
from toto.runtime.errors import ConfigError
from toto.training.config import TrainConfig
from toto.training.tokenizer import TokenizerTrainConfig

PRETRAINING: dict[str, Callable[[], TrainConfig]] = {
    "demo": pretraining.demo,
    "nano": pretraining.nano,
    "tiny": pretraining.tiny,
    "small": pretraining.small,
    "base": pretraining.base,
    "large": pretraining.large,
    "1b": pretraining.one_b,
    **{name: partial(pretraining.scaling, name) for name in SCALING},
    "table3-tokens": pretraining.table3_tokens,
    "table3-patch-patch": pretraining.table3_patch_patch,
    "table3-patch-dvae": pretraining.table3_patch_dvae,
    "table6-toto": baselines.table6_toto,
    "table6-gpt2": baselines.table6_gpt2,
    "table6-mamba": baselines.table6_mamba,
    "table6-nano-toto": baselines.table6_nano_toto,
    "table6-nano-gpt2": baselines.table6_nano_gpt2,
    "table6-nano-mamba": baselines.table6_nano_mamba,
    "table6-images-toto": baselines.table6_images_toto,
    "table6-images-gpt2": baselines.table6_images_gpt2,
    "table6-images-mamba": baselines.table6_images_mamba,
    "base-32": continuing.base_32,
    "large-32": continuing.large_32,
    "1b-32": continuing.one_b_32,
    "nano-32": continuing.nano_32,
}

RECOGNITION: dict[str, Callable[[], FinetuneConfig]] = {
    "imagenet": recognition.imagenet,
    "imagenet-full": recognition.imagenet_full,
    "kinetics": recognition.kinetics,
    "kinetics-mlp": recognition.kinetics_mlp,
    "frozen-average": recognition.frozen_average,
    "frozen-attention": recognition.frozen_attention,
    "images-small": recognition.images_small,
    "images-small-full": recognition.images_small_full,
    "images-small-frozen": recognition.images_small_frozen,
    "clips-small": recognition.clips_small,
}

STUDIES: dict[str, Callable[[], ResolutionStudy]] = {
    "table4": studies.table4,
    "table4-small": studies.table4_small,
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
