"""The objective: predict what comes next (paper, section 3).

Codes are classified: mean negative log-likelihood. Patches are regressed: mean squared error of the next patch's
normalised values, as MAE's of masked ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from toto.model.causal import CausalModel
from toto.runtime.errors import ConfigError
from toto.tokens.patches import normalised


def next_token_loss(
    model: CausalModel, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None = None
) -> Float[Tensor, ""]:
    """Mean loss over all predictions of every sequence, by the model's targets.

    Codes: in nats, over S - 1 predictions, the end token included. Pixels: squared error, over N predictions.
    """
    if model.config.targets == "pixels":
        return patch_errors(model, sequences, patches).mean()
    logits = model(sequences[:, :-1], patches=patches).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


def token_losses(
    model: CausalModel, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None = None
) -> Float[Tensor, "B S-1"]:
    """The loss in nats of every prediction of a code by itself."""
    logits = model(sequences[:, :-1], patches=patches).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none")


def patch_errors(
    model: CausalModel, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None
) -> Float[Tensor, "B N"]:
    """The mean squared error of every predicted patch by itself; the last patch is a target only."""
    if patches is None:
        raise ConfigError("the model predicts patches, and none are given", where="patches")
    predicted = model(sequences[:, :-2], patches=patches[:, :-1]).logits
    return F.mse_loss(predicted.float(), normalised(patches), reduction="none").mean(dim=-1)
