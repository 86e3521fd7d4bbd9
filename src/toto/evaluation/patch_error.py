"""Held-out error of predicted patches, beside two honest baselines.

The error is the mean squared error of a patch's normalised values, as it was trained on.

* Mean: predicts zero, the mean of every normalised patch. Just below 1, and less where patches are flat.
* Copy: predicts the normalised patch at the same place one frame ago; zero in a first frame, which has none.
  Patches that have nothing to do with each other cost 2, so copying can be worse than the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from toto.model.causal import CausalModel
from toto.runtime.device import Precision, autocast
from toto.runtime.errors import ConfigError
from toto.tokens.patches import normalised
from toto.training.mixture import patches_of, sequences_of
from toto.training.objective import patch_errors
from toto.training.source import Window


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Mean squared errors of normalised patches, by window and frame.

    Attributes:
        model: `[windows, T]`.
        mean: `[windows, T]`.
        copy: `[windows, T]`.
    """

    model: Float[Tensor, "windows T"]
    mean: Float[Tensor, "windows T"]
    copy: Float[Tensor, "windows T"]


@torch.inference_mode()
def model_errors(
    model: CausalModel, windows: list[Window], *, batch: int = 8, precision: Precision = "auto"
) -> Float[Tensor, "windows T"]:
    """The model's error in every frame of some windows, which hold their pixels."""
    if not windows:
        raise ConfigError("no window to measure", where="held-out data", fix="give longer videos or a smaller T")
    parts: list[Tensor] = []
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        patches = patches_of(group, device=model.device)
        with autocast(precision, model.device):
            errors = patch_errors(model, sequences_of(group).to(model.device), patches)
        parts.append(errors.reshape(len(group), len(group[0].codes), -1).mean(dim=2).double().cpu())
    return torch.cat(parts)


def baseline_errors(windows: list[Window]) -> tuple[Float[Tensor, "windows T"], Float[Tensor, "windows T"]]:
    """Errors of the mean and of copying in every frame."""
    mean, copy = [], []
    for window in windows:
        patches = patches_of([window])
        assert patches is not None
        targets = normalised(patches[0].double()).reshape(len(window.codes), -1)
        copied = torch.cat([torch.zeros_like(targets[:1]), targets[:-1]])
        mean.append(targets.square().mean(dim=1))
        copy.append((targets - copied).square().mean(dim=1))
    return torch.stack(mean), torch.stack(copy)


def measure_errors(
    model: CausalModel, windows: list[Window], *, batch: int = 8, precision: Precision = "auto"
) -> Errors:
    """Errors of the model and of both baselines on the same windows."""
    errors = model_errors(model, windows, batch=batch, precision=precision)
    mean, copy = baseline_errors(windows)
    return Errors(model=errors, mean=mean, copy=copy)
