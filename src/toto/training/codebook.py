"""Vector quantisation while it is learnt: a codebook that follows the encoder, or that learns by gradients.

Where it follows, each code moves to the (decayed) average of the vectors that chose it. A code that hardly any
vector chooses is put where the encoder is now, so that no part of the vocabulary stays dead. Gradients pass straight
through to the encoder, which a commitment term draws to its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.tokens.neural import Network
from toto.tokens.vqvae import VQVAE
from toto.training.learner import Learner, Moment, Part, gradients, pixel_error


@final
class Codebook:
    """The learning side of a codebook.

    Attributes:
        vectors: `[V, D]`, the model's codebook itself.
        count: `[V]`, decayed number of vectors a step that chose each code.
        total: `[V, D]`, decayed sum of these vectors.
    """

    def __init__(self, vectors: Tensor, *, begin_step: int, decay: float, dead_below: float, unit: bool, follow: bool):
        self.vectors = vectors
        self.begin_step, self.decay, self.dead_below = begin_step, decay, dead_below
        self.unit, self.follows = unit, follow
        even = 0.0 if begin_step else 1.0
        self.count = torch.full((len(vectors),), even, device=vectors.device)
        self.total = vectors.detach().clone() * even

    def active(self, step: int) -> bool:
        """Whether vectors are quantised at this step."""
        return step >= self.begin_step

    @torch.no_grad()
    def update(
        self, latents: Float[Tensor, "N D"], codes: Int64[Tensor, " N"], step: int, rng: np.random.Generator
    ) -> int:
        """Move the codebook after a step; how many codes were put on vectors of this step."""
        if not self.active(step):
            placed = torch.full_like(self.count, step == self.begin_step - 1, dtype=torch.bool)
            return self._place(placed, latents, rng)
        step_count = torch.bincount(codes, minlength=len(self.count)).to(self.count)
        self.count.lerp_(step_count, 1 - self.decay)
        if self.follows:
            step_total = torch.zeros_like(self.total).index_add_(0, codes, latents)
            self.total.lerp_(step_total, 1 - self.decay)
            chosen = self.count > 1e-6  # a code that nothing ever chose stays where it is
            means = self.total / self.count.clamp(min=1e-6)[:, None]
            means = F.normalize(self.total, dim=-1) if self.unit else means
            self.vectors.copy_(torch.where(chosen[:, None], means, self.vectors))
        return self._place(self.count < self.dead_below * len(codes) / len(self.count), latents, rng)

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return {"codebook.count": self.count, "codebook.total": self.total}

    def _place(self, which: Tensor, flat: Tensor, rng: np.random.Generator) -> int:
        """Put these codes on randomly drawn vectors of this step, with the weight of an even use."""
        number = int(which.sum())
        drawn = flat[torch.from_numpy(rng.integers(len(flat), size=number)).to(flat.device)]
        even = len(flat) / len(self.count)
        self.vectors[which] = drawn
        self.total[which] = drawn * even
        self.count[which] = even
        return number


def straight_through(latents: Tensor, chosen: Tensor) -> Tensor:
    """The chosen vectors, with gradients that pass straight through to the latents."""
    return latents + (chosen - latents).detach()


@dataclass(frozen=True, kw_only=True)
class UnitCodebook:
    """How the small VQ-VAE and its codebook of unit vectors learn.

    Attributes:
        begin_step: the autoencoder trains without quantisation before this step, and codes are placed on the
            vectors of the last step without it.
        decay: of the averages over steps.
        commitment: weight of the squared distance between a vector and its code.
        cooldown_commitment: the same during the cool-down.
        dead_below: a code with less than this share of an even use is put elsewhere.
        absolute_error: weight of the mean absolute error beside the mean squared one.
    """

    begin_step: int
    decay: float
    commitment: float
    cooldown_commitment: float
    dead_below: float
    absolute_error: float = 0.0

    def __post_init__(self) -> None:
        if self.begin_step < 1:
            raise ConfigError("the codes need vectors to be placed on", where="method.begin_step", fix="use 1 or more")

    def learner(self, model: Network) -> Learner:
        """The working part for a VQ-VAE.

        Raises:
            ConfigError: the network is another kind.
        """
        if not isinstance(model, VQVAE):
            raise ConfigError(f"trains a VQ-VAE, not a {type(model).__name__}", where="method")
        return UnitCodebookLearner(model, self)


@final
class UnitCodebookLearner(Learner):
    """The working part of `UnitCodebook`."""

    remedy = "raise method.dead_below, or lower learning_rate or model.vocab_size"

    def __init__(self, model: VQVAE, config: UnitCodebook):
        super().__init__(model)
        self.network, self.config = model, config
        self.codebook = Codebook(
            model.codebook,
            begin_step=config.begin_step,
            decay=config.decay,
            dead_below=config.dead_below,
            unit=True,
            follow=True,
        )

    def part(self, pixels: Float[Tensor, "B 3 H W"], moment: Moment, noise: torch.Generator) -> Part:
        """Error of the rebuilt pixels, and the distance of vectors from their codes."""
        latents = self.network.latents(pixels)
        codes = self.network.nearest(latents.detach())
        vectors, distance = latents, latents.new_zeros(())
        if self.codebook.active(moment.step):
            chosen = self.codebook.vectors[codes]
            distance = (latents - chosen).square().sum(-1).mean()
            vectors = straight_through(latents, chosen)
        rebuilt = self.network.pixels(vectors).float()
        weight = self.config.cooldown_commitment if moment.cooling else self.config.commitment
        loss = pixel_error(rebuilt, pixels, self.config.absolute_error) + weight * distance
        return Part(
            loss=loss.detach(),
            rebuilt=rebuilt.detach(),
            codes=codes.flatten(),
            gradients=gradients(loss, self.parameters),
            carried=latents.detach().flatten(0, 2),
            values={"code_distance": distance.detach()},
        )

    def after(self, parts: Sequence[Part], moment: Moment, rng: np.random.Generator) -> dict[str, float]:
        """Move the codebook."""
        return {"codes_revived": float(move(self.codebook, parts, moment, rng))}

    def state(self) -> dict[str, Tensor]:
        """The codebook's averages."""
        return self.codebook.state()

    def quantised(self, step: int) -> bool:
        """Whether the codes are placed."""
        return self.codebook.active(step)


def move(codebook: Codebook, parts: Sequence[Part], moment: Moment, rng: np.random.Generator) -> int:
    """Let a codebook follow a step's parts; how many codes were put elsewhere."""
    vectors = torch.cat([part.carried for part in parts if part.carried is not None])
    return codebook.update(vectors, torch.cat([part.codes for part in parts]), moment.step, rng)
