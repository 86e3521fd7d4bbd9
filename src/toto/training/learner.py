"""What one step of tokenizer training asks of a method: loss and gradients of some crops, and what follows a step.

A method is a frozen dataclass of its settings whose `learner` makes the working part. `Reconstruction` is the plain
one, for every network with a `relaxed` pass; the others lie beside: codebook, gumbel, adversary.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, final, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.runtime.errors import ConfigError
from toto.tokens.neural import Network


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a step is.

    Attributes:
        step: finished steps.
        cooling: whether the learning rate is on its last fall.
    """

    step: int
    cooling: bool


@dataclass(frozen=True, kw_only=True)
class Part:
    """What some of a step's crops gave.

    Attributes:
        loss: what the gradients are of.
        rebuilt: `[B, 3, H, W]`, pixels in [-1, 1], without gradients.
        codes: `[N]`, the codes of all cells.
        gradients: of the learner's `parameters`, in their order.
        carried: `[N, D]`, vectors that `after` needs.
        values: further numbers for the metrics.
    """

    loss: Tensor
    rebuilt: Tensor
    codes: Int64[Tensor, " N"]
    gradients: tuple[Tensor, ...]
    carried: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


class Learner(abc.ABC):
    """The working part of a method.

    Attributes:
        remedy: what to change where the vocabulary collapses, for the warning.
        model: the network that is trained.
        extra: what is trained beside it and thrown away afterwards; empty for most methods.
    """

    remedy: ClassVar[str]

    def __init__(self, model: Network, extra: nn.Module | None = None):
        self.model = model
        self.extra = extra or nn.Module()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The network's parameters, then the extra ones."""
        return [*self.model.parameters(), *self.extra.parameters()]

    @abc.abstractmethod
    def part(self, pixels: Float[Tensor, "B 3 H W"], moment: Moment, noise: torch.Generator) -> Part:
        """Loss and gradients of some crops; changes nothing, so that several can run side by side."""

    def after(self, parts: Sequence[Part], moment: Moment, rng: np.random.Generator) -> dict[str, float]:
        """What follows the optimizer's step; returns numbers for the metrics. By default nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors, beside the parameters and buffers, that decide how the run goes on; themselves, not copies."""
        return {}

    def quantised(self, step: int) -> bool:
        """Whether codes mean anything yet at this step."""
        return True


@runtime_checkable
class Method(Protocol):
    """Settings of a way to train."""

    def learner(self, model: Any) -> Learner:
        """The working part for a network."""


def gradients(loss: Tensor, parameters: Sequence[Tensor], *, keep: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a loss, with noughts for parameters that it doesn't reach."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=keep)
    return tuple(
        torch.zeros_like(parameter) if one is None else one for one, parameter in zip(found, parameters, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Rebuild the pixels, and nothing else: for waists that have nothing to learn.

    Attributes:
        absolute_error: weight of the mean absolute error beside the mean squared one.
    """

    absolute_error: float = 0.0

    def learner(self, model: Network) -> Learner:
        """The working part for a network that has a `relaxed` pass.

        Raises:
            ConfigError: it has none.
        """
        return ReconstructionLearner(model, self)


@final
class ReconstructionLearner(Learner):
    """The working part of `Reconstruction`."""

    remedy = "lower learning_rate or the number of levels"

    def __init__(self, model: Network, config: Reconstruction):
        super().__init__(model)
        if not hasattr(model, "relaxed"):
            raise ConfigError(
                f"{type(model).__name__} has no `relaxed(pixels)` that returns rebuilt pixels and codes",
                where="method",
                fix="add one or use another method",
            )
        self.config = config

    def part(self, pixels: Float[Tensor, "B 3 H W"], moment: Moment, noise: torch.Generator) -> Part:
        """Errors of the rebuilt pixels."""
        rebuilt, codes = self.model.relaxed(pixels)  # type: ignore[operator]
        loss = pixel_error(rebuilt.float(), pixels, self.config.absolute_error)
        return Part(
            loss=loss.detach(),
            rebuilt=rebuilt.detach().float(),
            codes=codes.flatten(),
            gradients=gradients(loss, self.parameters),
        )


def pixel_error(rebuilt: Tensor, pixels: Tensor, absolute: float) -> Tensor:
    """Mean squared error, and the absolute one with its weight."""
    return F.mse_loss(rebuilt, pixels) + absolute * F.l1_loss(rebuilt, pixels)
