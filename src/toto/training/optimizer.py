"""AdamW with decay on matrices only, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from toto.model.parametrisation import WeightRule
from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule (paper, section 3.2; decay, clipping and floor are LLaMA's, not published).

    Attributes:
        peak_lr: learning rate after the warm-up.
        warmup_steps: steps of linear warm-up from 0.
        floor: the last step's learning rate as a share of the peak.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled, on matrices and embeddings only.
        clip: largest global norm of the gradient.
    """

    peak_lr: float = 3e-4
    warmup_steps: int = 2000
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak_lr) and self.peak_lr > 0):
            raise ConfigError(f"must be positive, is {self.peak_lr}", where="optimizer.peak_lr")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"must lie in 0 .. 1, is {self.floor}", where="optimizer.floor")
        if self.warmup_steps < 0 or self.clip <= 0:
            raise ConfigError("warmup_steps must not be negative and clip must be positive", where="optimizer")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of step 0 .. steps - 1: linear warm-up, then a cosine down to `floor` x peak at the last step."""
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return config.peak_lr * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, *, rules: Mapping[str, WeightRule] | None = None
) -> torch.optim.AdamW:
    """Fused AdamW, with a group for each pair of factors that the weights' rules give.

    A group's rate is that of the schedule x its `rate`. Without rules all weights have one rate, and matrices decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            factors = (rules[name].rate, rules[name].decay) if rules else (1.0, float(weight.ndim >= 2))
            groups.setdefault(factors, []).append(weight)
    described = [
        {"params": weights, "weight_decay": config.weight_decay * decay, "rate": rate}
        for (rate, decay), weights in groups.items()
    ]
    return torch.optim.AdamW(described, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The global norm of all gradients; of sharded ones, over all processes."""
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clipped_step(optimizer: torch.optim.AdamW, norm: Float[Tensor, ""], clip: float) -> None:
    """A step of `make_optimizer`'s, with gradients scaled down to a global norm of at most `clip`.

    The kernel scales them as it reads them. Sharded ones are scaled beforehand.

    Args:
        optimizer: whose step it is.
        norm: of the gradients, which is what `gradient_norm` says and must be finite.
        clip: as in `OptimizerConfig`.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if any(isinstance(weight, DTensor) for weight in weights):
        torch.nn.utils.clip_grads_with_norm_(weights, clip, norm)
        optimizer.step()
        return
    divisor = ((norm + 1e-6) / clip).clamp(min=1.0)  # as clip_grad_norm_ has it
    scaled: Any = optimizer  # torch reads the attribute, and declares it nowhere
    scaled.grad_scale = None if divisor == 1 else divisor.float()
    try:
        optimizer.step()
    finally:
        del scaled.grad_scale


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step run at the schedule's `rate`, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
