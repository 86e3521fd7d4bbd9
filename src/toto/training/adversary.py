"""Training of VQGAN: absolute error, a codebook that learns by gradients or follows, and an optional PatchGAN.

As in github.com/CompVis/taming-transformers (taming/modules/losses/vqperceptual.py, discriminator/model.py,
vqvae/quantize.py), with two differences. The perceptual loss is off: its network was trained on ImageNet labels,
which would leak into what is measured with the tokens (section 3.1 of the paper says so of VQGAN); one can be plugged
in. And generator and discriminator take their steps at the same time, from the same rebuilt pixels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toto.runtime.errors import ConfigError
from toto.tokens.neural import Network
from toto.tokens.vqgan import VQGAN
from toto.training.codebook import Codebook, move, straight_through
from toto.training.learner import Learner, Moment, Part, gradients


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Settings; the defaults are the published ones but for the perceptual loss and the dead codes.

    Attributes:
        codebook: whether the codes learn by "gradient" (published) or follow the encoder's moving "average".
        commitment: weight of the mean squared distance that draws vectors to their codes.
        codebook_weight: the same that draws codes to their vectors, where they learn by gradients. The published
            implementation has 1 and 0.25 in this order, against its paper's letter; so have we.
        begin_step: the autoencoder trains without quantisation before this step, and codes are then placed on its
            vectors; 0 starts with small random codes, as published.
        decay: of the averages over steps.
        dead_below: a code with less than this share of an even use is put on a vector of the step; 0 never.
        perceptual: a perceptual loss to plug in, "package.module:name": a function of rebuilt and true pixels
            `[B, 3, H, W]` in [-1, 1] that returns their distance, differentiable. None for none.
        perceptual_weight: its weight beside the absolute error.
        discriminator_start: step at which the discriminator begins; None never.
        discriminator_weight: weight of its verdict, on top of the balance of gradients at the last layer.
        discriminator_width: channels of its first layer.
        discriminator_layers: how many of its layers halve the sides before the last two.
    """

    codebook: Literal["gradient", "average"] = "gradient"
    commitment: float = 1.0
    codebook_weight: float = 0.25
    begin_step: int = 0
    decay: float = 0.99
    dead_below: float = 0.0
    perceptual: str | None = None
    perceptual_weight: float = 1.0
    discriminator_start: int | None = 250_001
    discriminator_weight: float = 0.8
    discriminator_width: int = 64
    discriminator_layers: int = 3

    def learner(self, model: Network) -> Learner:
        """The working part for a VQGAN.

        Raises:
            ConfigError: the network is another kind, or the perceptual loss can't be imported.
        """
        if not isinstance(model, VQGAN):
            raise ConfigError(f"trains a VQGAN, not a {type(model).__name__}", where="method")
        return AdversarialLearner(model, self)


@final
class Discriminator(nn.Module):
    """PatchGAN: a verdict on each of many overlapping patches. Norms use the batch's statistics and keep none."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = width
        for number in range(1, layers + 1):
            after = width * min(2**number, 8)
            stack += [
                nn.Conv2d(before, after, 4, stride=2 if number < layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(after, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            before = after
        stack.append(nn.Conv2d(before, 1, 4, padding=1))
        self.main = nn.Sequential(*stack)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Verdicts `[B, 1, h, w]`; larger means truer."""
        out: Tensor = self.main(pixels)
        return out


@final
class AdversarialLearner(Learner):
    """The working part of `Adversarial`."""

    remedy = "raise method.dead_below or use method.codebook average, or lower learning_rate or model.vocab_size"

    def __init__(self, model: VQGAN, config: Adversarial):
        watched = config.discriminator_start is not None
        critic = Discriminator(config.discriminator_width, config.discriminator_layers) if watched else None
        super().__init__(model, critic)
        self.network, self.config, self.critic = model, config, critic
        self.codebook = Codebook(
            model.codebook.data,
            begin_step=config.begin_step,
            decay=config.decay,
            dead_below=config.dead_below,
            unit=False,
            follow=config.codebook == "average",
        )
        self.perceptual = plugged_in(config.perceptual) if config.perceptual else None

    def part(self, pixels: Float[Tensor, "B 3 H W"], moment: Moment, noise: torch.Generator) -> Part:
        """The autoencoder's loss, and the discriminator's beside it once it has begun."""
        config = self.config
        latents = self.network.latents(pixels)
        codes = self.network.nearest(latents.detach())
        vectors, drawn = latents, latents.new_zeros(())
        if self.codebook.active(moment.step):
            chosen = self.network.codebook[codes]
            drawn = config.commitment * F.mse_loss(latents, chosen.detach())
            if config.codebook == "gradient":
                drawn = drawn + config.codebook_weight * F.mse_loss(chosen, latents.detach())
            vectors = straight_through(latents, chosen)
        rebuilt = self.network.pixels(vectors).float()
        error = F.l1_loss(rebuilt, pixels)
        if self.perceptual:
            error = error + config.perceptual_weight * self.perceptual(rebuilt, pixels).mean()
        loss = error + drawn
        values = {"error": error.detach(), "code_distance": drawn.detach()}
        of_critic: tuple[Tensor, ...] = tuple(torch.zeros_like(one) for one in self.extra.parameters())
        started = config.discriminator_start is not None and moment.step >= config.discriminator_start
        if self.critic is not None and started:
            verdict = -self.critic(rebuilt).mean()
            weight = balance(error, verdict, self.network.decoder.conv_out.weight) * config.discriminator_weight
            loss = loss + weight * verdict
            judged = hinge(self.critic(pixels), self.critic(rebuilt.detach()))
            of_critic = gradients(judged, list(self.critic.parameters()))
            values |= {"verdict": verdict.detach(), "discriminator": judged.detach(), "balance": weight}
        return Part(
            loss=loss.detach(),
            rebuilt=rebuilt.detach(),
            codes=codes.flatten(),
            gradients=gradients(loss, list(self.network.parameters())) + of_critic,
            carried=latents.detach().flatten(0, 2),
            values=values,
        )

    def after(self, parts: Sequence[Part], moment: Moment, rng: np.random.Generator) -> dict[str, float]:
        """Move codes: all of them where they follow, dead ones elsewhere."""
        return {"codes_revived": float(move(self.codebook, parts, moment, rng))}

    def state(self) -> dict[str, Tensor]:
        """The codebook's averages."""
        return self.codebook.state()

    def quantised(self, step: int) -> bool:
        """Whether vectors are quantised yet."""
        return self.codebook.active(step)


def hinge(true: Tensor, rebuilt: Tensor) -> Tensor:
    """The discriminator's loss from its verdicts."""
    return (F.relu(1 - true).mean() + F.relu(1 + rebuilt).mean()) / 2


def balance(error: Tensor, verdict: Tensor, layer: Tensor) -> Tensor:
    """How much the error's gradient at a layer is larger than the verdict's; no gradient goes through it."""
    of_error, of_verdict = (torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in (error, verdict))
    ratio: Tensor = of_error.norm() / (of_verdict.norm() + 1e-4)
    return ratio.clamp(0, 1e4).detach()


def plugged_in(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual loss of this name."""
    module, _, attribute = name.partition(":")
    try:
        found: Callable[[Tensor, Tensor], Tensor] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"can't import the perceptual loss {name!r} ({error})", where="method.perceptual", fix="package.module:name"
        ) from None
    return found
