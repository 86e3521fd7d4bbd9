"""Training of the dVAE: a Gumbel-softmax relaxation of its codes, and a logit-Laplace likelihood of its pixels.

The published recipe (Ramesh et al., 2021, arXiv 2102.12092, section 2.1 and appendix A): relaxed codes in both
passes, a temperature that falls from 1 to 1/16, a KL term towards the uniform distribution over codes whose weight
rises from 0 to 6.6, both along a cosine. All is divided by the number of pixel values, so the KL of a cell of 8 x 8
pixels counts by its weight / 192. What short runs need beside it is off by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.tokens.dvae import DVAE, squeezed, unsqueezed
from toto.tokens.neural import Network
from toto.training.learner import Learner, Moment, Part, gradients


@dataclass(frozen=True, kw_only=True)
class Gumbel:
    """Settings of the relaxation; the defaults are the published ones.

    Attributes:
        temperature: of the relaxation at the beginning.
        final_temperature: at the end of its fall.
        temperature_steps: steps of the fall.
        kl_weight: weight of the KL term after its rise, before the division by the number of pixel values.
        kl_steps: steps of the rise.
        begin_step: the autoencoder trains without codes before this step, the logits going to the decoder as they
            are; codes are then placed on cells of that step: the encoder's weights of a code on the cell's features,
            the decoder's on what it got of the cell. 0 as published: both sides begin at random, and in short runs
            everything ends on a few codes before the decoder has learnt anything.
        sharpness: how much lower the logit of an average code is than that of the nearest one, when they are placed.
        noise_steps: steps after `begin_step` over which the noise rises along a cosine; 0 for all of it at once, as
            published.
        dead_below: a code that is chosen less than this share of an even use becomes a twin of the one chosen at a
            drawn cell of the step, leaning towards that cell; 0 never, as published.
        decay: of the average over steps of how often a code is chosen.
    """

    temperature: float = 1.0
    final_temperature: float = 1 / 16
    temperature_steps: int = 150_000
    kl_weight: float = 6.6
    kl_steps: int = 5_000
    begin_step: int = 0
    sharpness: float = 100.0
    noise_steps: int = 0
    dead_below: float = 0.0
    decay: float = 0.99

    def __post_init__(self) -> None:
        if min(self.temperature, self.final_temperature) <= 0 or min(self.temperature_steps, self.kl_steps) < 1:
            raise ConfigError(f"temperatures and steps of {self} must be positive", where="method")

    def temperature_at(self, step: int) -> float:
        """Temperature at a step."""
        return along_cosine(self.temperature, self.final_temperature, (step - self.begin_step) / self.temperature_steps)

    def kl_weight_at(self, step: int) -> float:
        """Weight of the KL term at a step."""
        return along_cosine(0.0, self.kl_weight, (step - self.begin_step) / self.kl_steps)

    def noise_at(self, step: int) -> float:
        """Scale of the noise at a step."""
        return along_cosine(0.0, 1.0, (step - self.begin_step) / self.noise_steps) if self.noise_steps else 1.0

    def learner(self, model: Network) -> Learner:
        """The working part for a dVAE.

        Raises:
            ConfigError: the network is another kind.
        """
        if not isinstance(model, DVAE):
            raise ConfigError(f"trains a dVAE, not a {type(model).__name__}", where="method")
        return GumbelLearner(model, self)


@final
class GumbelLearner(Learner):
    """The working part of `Gumbel`."""

    remedy = "set method.begin_step and method.dead_below, raise method.kl_weight, or lower learning_rate"

    def __init__(self, model: DVAE, config: Gumbel):
        super().__init__(model)
        self.network, self.config = model, config
        first = model.decoder.first.weight
        self.count = torch.ones(first.shape[1], device=first.device)

    def part(self, pixels: Float[Tensor, "B 3 H W"], moment: Moment, noise: torch.Generator) -> Part:
        """The negative evidence bound of some crops, in nats a pixel value; before there are codes, its likelihood."""
        target = squeezed((pixels + 1) / 2)
        features = self.network.features(target)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.network.encoder.last(features)
        mixed, divergence = logits, logits.new_zeros(())
        if self.quantised(moment.step):
            drawn = self.config.noise_at(moment.step) * gumbel_noise(logits.shape, noise).to(logits.device)
            mixed = torch.softmax((logits + drawn) / self.config.temperature_at(moment.step), dim=1)
            divergence = kl_to_uniform(logits).mean()
        location, log_scale = self.network.values(mixed).chunk(2, dim=1)
        likelihood = -logit_laplace(target, location, log_scale).mean()
        cells_per_value = logits.shape[2] * logits.shape[3] / pixels[0].numel()
        loss = likelihood + self.config.kl_weight_at(moment.step) * cells_per_value * divergence
        codes = logits.detach().argmax(1, keepdim=True)
        return Part(
            loss=loss.detach(),
            rebuilt=unsqueezed(torch.sigmoid(location.detach())) * 2 - 1,
            codes=codes.flatten(),
            gradients=gradients(loss, self.parameters),
            carried=self._carried(features.detach(), mixed.detach(), codes) if self._places(moment.step) else None,
            values={"likelihood": likelihood.detach(), "kl": divergence.detach()},
        )

    def _places(self, step: int) -> bool:
        """Whether codes may be placed after this step."""
        return bool(self.config.dead_below) if self.quantised(step) else step == self.config.begin_step - 1

    def _carried(self, features: Tensor, mixed: Tensor, codes: Tensor) -> Tensor:
        """What codes are placed with: a cell's features, what the decoder got of it, and its code."""
        with torch.no_grad(), torch.autocast(mixed.device.type, enabled=False):
            got = F.conv2d(mixed, self.network.decoder.first.weight)
        return torch.cat([features, got, codes.to(got.dtype)], dim=1).movedim(1, -1).flatten(0, 2)

    @torch.no_grad()
    def after(self, parts: Sequence[Part], moment: Moment, rng: np.random.Generator) -> dict[str, float]:
        """Place all codes where it is time to, and give dead ones another place from then on."""
        if not self._places(moment.step):
            return {}
        cells = torch.cat([part.carried for part in parts if part.carried is not None])
        if not self.quantised(moment.step):
            self._place(cells, rng)
            return {}
        codes = torch.cat([part.codes for part in parts])
        self.count.lerp_(torch.bincount(codes, minlength=len(self.count)).to(self.count), 1 - self.config.decay)
        dead = self.count < self.config.dead_below * len(codes) / len(self.count)
        self._revive(dead, cells, rng)
        return {"codes_revived": float(dead.sum())}

    def _place(self, cells: Tensor, rng: np.random.Generator) -> None:
        """Put every code on a randomly drawn cell: its logit falls with the squared distance from these features."""
        last, first = self.network.encoder.last, self.network.decoder.first
        features, got, _ = self._parts_of(cells, len(self.count), rng)
        some = features[:: max(1, len(features) // 256)]
        scale = 2 * self.config.sharpness / torch.cdist(some, features).square().mean().clamp(min=1e-12)
        last.weight.copy_((scale * features)[:, :, None, None])
        last.bias.copy_(-scale * features.square().sum(1) / 2)
        first.weight.copy_(got.T[:, :, None, None])
        self.count.fill_(len(cells) / len(self.count))

    def _revive(self, dead: Tensor, cells: Tensor, rng: np.random.Generator) -> None:
        """Make dead codes twins of chosen ones: half a nat above them at the drawn cell, below them far from it."""
        last, first = self.network.encoder.last, self.network.decoder.first
        features, _, codes = self._parts_of(cells, int(dead.sum()), rng)
        twins = codes[:, 0].round().long()
        lean = features / features.square().sum(1, keepdim=True).clamp(min=1e-12)
        last.weight[dead] = last.weight[twins] + lean[:, :, None, None]
        last.bias[dead] = last.bias[twins] - 0.5
        first.weight[:, dead] = first.weight[:, twins]
        self.count[dead] = len(cells) / len(self.count)

    def _parts_of(self, cells: Tensor, number: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Features, what the decoder got, and codes of randomly drawn cells; all different where there are enough."""
        drawn = rng.permutation(len(cells))[:number] if number <= len(cells) else rng.integers(len(cells), size=number)
        chosen = cells[torch.from_numpy(drawn).to(cells.device)]
        return torch.tensor_split(chosen, [self.network.encoder.last.weight.shape[1], cells.shape[1] - 1], dim=1)

    def state(self) -> dict[str, Tensor]:
        """How often codes are chosen."""
        return {"codes.count": self.count}

    def quantised(self, step: int) -> bool:
        """Whether codes mean anything at this step."""
        return step >= self.config.begin_step


def gumbel_noise(shape: torch.Size, noise: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32, on the CPU."""
    return -torch.empty(shape).exponential_(generator=noise).log()


def logit_laplace(
    pixels: Float[Tensor, "B 3 H W"], location: Float[Tensor, "B 3 H W"], log_scale: Float[Tensor, "B 3 H W"]
) -> Float[Tensor, "B 3 H W"]:
    """Log density of pixels in (0, 1) whose logits are Laplace distributed (section 2.1 of the dVAE's paper)."""
    jacobian = torch.log(pixels * (1 - pixels))
    return -(torch.logit(pixels) - location).abs() * torch.exp(-log_scale) - log_scale - math.log(2) - jacobian


def kl_to_uniform(logits: Float[Tensor, "B V rows cols"]) -> Float[Tensor, "B rows cols"]:
    """Divergence of each cell's distribution over codes from the uniform one, in nats."""
    log_shares = torch.log_softmax(logits, dim=1)
    return (log_shares.exp() * log_shares).sum(1) + math.log(logits.shape[1])


def along_cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine, and `end` ever after."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
