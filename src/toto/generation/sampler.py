"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 always takes the likeliest.
        top_k: only the k likeliest, 0 for all.
        top_p: only the likeliest whose probabilities reach p together, 1 for all.
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"must not be negative, is {self.temperature}", where="--temperature")
        if self.top_k < 0:
            raise ConfigError(f"must not be negative, is {self.top_k}", where="--top-k", fix="use 0 for all")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"must lie above 0 and at most at 1, is {self.top_p}", where="--top-p")


def filtered_probabilities(logits: Float[Tensor, "B V"], config: SamplerConfig) -> Float[Tensor, "B V"]:
    """Probabilities after temperature, top-k and top-p, in this order; ties at the k-th place are all kept."""
    scaled = logits.float() / config.temperature
    if 0 < config.top_k < scaled.shape[-1]:
        least = scaled.topk(config.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    probabilities = scaled.softmax(dim=-1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        dropped = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, before >= config.top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def sample(logits: Float[Tensor, "B V"], config: SamplerConfig, generator: torch.Generator) -> Int64[Tensor, " B"]:
    """Draw one id for each row of logits; ids with logit -inf are never drawn."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, config)
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(logits.device)
