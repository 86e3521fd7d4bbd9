"""The objective: predict what comes next (paper, section 3).

Codes are classified: mean negative log-likelihood. Patches are regressed: mean squared error of the next patch's
normalised values, as MAE's of masked ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from toto.model.causal import CausalModel
from toto.model.fused import normed
from toto.model.layers import Head
from toto.runtime.errors import ConfigError
from toto.tokens.patches import normalised
from toto.training.fused_loss import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a batch costs.

    Attributes:
        mean: of all predictions, to be differentiated.
        each: the loss of every prediction by itself, without gradients: nats of N = S - 1 codes, the end token
            included, or the squared error of N patches.
    """

    mean: Float[Tensor, ""]
    each: Float[Tensor, "B N"]


def next_token_loss(
    model: CausalModel, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None = None
) -> Loss:
    """The loss of all predictions of every sequence, by the model's targets.

    Codes are predicted without all their logits in memory. The model's parts are called, not the model itself.
    """
    model.require_causal()
    if model.config.targets == "pixels":
        errors = patch_errors(model, sequences, patches)
        return Loss(mean=errors.mean(), each=errors.detach())
    return code_loss(model, model.trunk(sequences[:, :-1], patches=patches)[0], sequences[:, 1:])


def code_loss(model: CausalModel, states: Float[Tensor, "B N D"], targets: Int64[Tensor, "B N"]) -> Loss:
    """The loss of codes that are predicted from what the last block gives."""
    hidden_states = normed(states, model.norm)
    if isinstance(model.head, Head) and model.head.multiplier != 1:
        hidden_states = hidden_states * model.head.multiplier
    mean, each = linear_cross_entropy(hidden_states.flatten(0, 1), model.head.weight, targets.flatten())
    return Loss(mean=mean, each=each.view_as(targets))


def token_losses(
    model: CausalModel, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None = None
) -> Float[Tensor, "B S-1"]:
    """The loss in nats of every prediction of a code by itself."""
    return next_token_loss(model, sequences, patches).each


def patch_errors(
    model: CausalModel, sequences: Int64[Tensor, "B S"], patches: Float[Tensor, "B N P"] | None
) -> Float[Tensor, "B N"]:
    """The mean squared error of every predicted patch by itself; the last patch is a target only."""
    if patches is None:
        raise ConfigError("the model predicts patches, and none are given", where="patches")
    states, _, _ = model.trunk(sequences[:, :-2], patches=patches[:, :-1])
    predicted = model.head(normed(states, model.norm))
    return F.mse_loss(predicted.float(), normalised(patches), reduction="none").mean(dim=-1)
