"""How widths scale a model: where each weight begins, its learning rate and decay, attention and the output.

The trunk, the head and the optimizer ask here and assume nothing. A further parametrisation is one more class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from toto.model.config import ModelConfig

WRITERS = ("attention.out.weight", "mlp.down.weight")  # matrices that write into the residual stream


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """What holds for one weight.

    Attributes:
        mean: of its initial values.
        std: of its initial values; 0 begins with the mean everywhere.
        rate: factor on the learning rate.
        decay: factor on the weight decay.
    """

    mean: float = 0.0
    std: float = 0.0
    rate: float = 1.0
    decay: float = 0.0


class Parametrisation(ABC):
    """The rules of one parametrisation, for models of any width."""

    @abstractmethod
    def attention_scale(self, config: ModelConfig) -> float:
        """What scores q . k are multiplied by."""

    @abstractmethod
    def output_multiplier(self, config: ModelConfig) -> float:
        """What the output layer's input is multiplied by."""

    @abstractmethod
    def rule(self, name: str, dimensions: int, config: ModelConfig) -> WeightRule:
        """The rule for a weight by its name in the model and its number of dimensions."""


class Standard(Parametrisation):
    """LLaMA's: one rate for all, one `init_std`, less where a matrix writes into the residual stream.

    Only matrices decay. Norms begin as one, biases as zero.
    """

    def attention_scale(self, config: ModelConfig) -> float:
        """1 / sqrt(K)."""
        return 1 / math.sqrt(config.head_size)

    def output_multiplier(self, config: ModelConfig) -> float:
        """1."""
        return 1.0

    def rule(self, name: str, dimensions: int, config: ModelConfig) -> WeightRule:
        """Matrices are drawn and decay; the rest begins as a constant and doesn't."""
        if dimensions < 2:
            return WeightRule(mean=0.0 if name.endswith("bias") else 1.0)
        writes = name.endswith(WRITERS)
        return WeightRule(std=config.init_std / math.sqrt(2 * config.layers) if writes else config.init_std, decay=1.0)


PARAMETRISATIONS: dict[str, Parametrisation] = {"standard": Standard()}


def parametrisation(config: ModelConfig) -> Parametrisation:
    """The rules a configuration names."""
    return PARAMETRISATIONS[config.parametrisation]
