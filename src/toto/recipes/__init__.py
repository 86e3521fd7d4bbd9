"""Values of particular experiments: functions that return frozen configurations.

Each recipe is headed by its command, its cost and the result to expect.
"""

from __future__ import annotations

from collections.abc import Callable

from toto.recipes import pretraining, tokenizer
from toto.training.config import TrainConfig
from toto.training.tokenizer import TokenizerTrainConfig

PRETRAINING: dict[str, Callable[[], TrainConfig]] = {
    "demo": pretraining.demo,
    "nano": pretraining.nano,
    "base": pretraining.base,
    "large": pretraining.large,
    "1b": pretraining.one_b,
}

TOKENIZERS: dict[str, Callable[[], TokenizerTrainConfig]] = {
    "embedded": tokenizer.embedded,
}
