"""Vector quantisation while it is learnt: a codebook of unit vectors that follows the encoder.

Each code moves to the (decayed) average of the vectors that chose it. A code that hardly any vector chooses is put
where the encoder is now, so that no part of the vocabulary stays dead. Gradients pass straight through to the
encoder, which a commitment term draws to its codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.tokens.vqvae import VQVAE


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codebook learns.

    Attributes:
        begin_step: the autoencoder trains without quantisation before this step, and codes are placed on the
            vectors of the last step without it.
        decay: of the averages over steps.
        commitment: weight of the squared distance between a vector and its code.
        cooldown_commitment: the same during the cool-down.
        dead_below: a code with less than this share of an even use is put elsewhere.
    """

    begin_step: int
    decay: float
    commitment: float
    cooldown_commitment: float
    dead_below: float


@final
class Codebook:
    """The learning side of `VQVAE.codebook`.

    Attributes:
        vectors: `[V, D]`, the model's codebook itself.
        count: `[V]`, decayed number of vectors a step that chose each code.
        total: `[V, D]`, decayed sum of these vectors.
    """

    def __init__(self, model: VQVAE, config: CodebookConfig):
        if config.begin_step < 1:
            raise ConfigError(
                "the codes need vectors to be placed on", where="codebook.begin_step", fix="use 1 or more"
            )
        self.config = config
        self.vectors = model.codebook
        self.count = torch.zeros(len(self.vectors), device=self.vectors.device)
        self.total = torch.zeros_like(self.vectors)

    def active(self, step: int) -> bool:
        """Whether vectors are quantised at this step."""
        return step >= self.config.begin_step

    def quantise(
        self, latents: Float[Tensor, "B rows cols D"], codes: Int64[Tensor, "B rows cols"]
    ) -> tuple[Float[Tensor, "B rows cols D"], Float[Tensor, ""]]:
        """The codes' vectors, with gradients that pass straight through to the latents; and their distance."""
        chosen = self.vectors[codes]
        distance = (latents - chosen).square().sum(-1).mean()
        return latents + (chosen - latents).detach(), distance

    @torch.no_grad()
    def follow(
        self, latents: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], step: int, rng: np.random.Generator
    ) -> int:
        """Move the codebook after a step; how many codes were put on vectors of this step."""
        if not self.active(step):
            placed = torch.full_like(self.count, step == self.config.begin_step - 1, dtype=torch.bool)
            return self._place(placed, latents, rng)
        step_count = torch.bincount(codes, minlength=len(self.count)).to(self.count)
        step_total = torch.zeros_like(self.total).index_add_(0, codes, latents)
        self.count.lerp_(step_count, 1 - self.config.decay)
        self.total.lerp_(step_total, 1 - self.config.decay)
        self.vectors.copy_(F.normalize(self.total, dim=-1))
        return self._place(self.count < self.config.dead_below * len(codes) / len(self.count), latents, rng)

    def _place(self, which: Tensor, flat: Tensor, rng: np.random.Generator) -> int:
        """Put these codes on randomly drawn vectors of this step, with the weight of an even use."""
        number = int(which.sum())
        drawn = flat[torch.from_numpy(rng.integers(len(flat), size=number)).to(flat.device)]
        even = len(flat) / len(self.count)
        self.vectors[which] = drawn
        self.total[which] = drawn * even
        self.count[which] = even
        return number
