"""The objective: mean negative log-likelihood of the next token (paper, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from toto.model.transformer import Transformer


def next_token_loss(model: Transformer, sequences: Int64[Tensor, "B S"]) -> Float[Tensor, ""]:
    """Mean loss in nats over all S - 1 predictions of every sequence, the end token included."""
    logits = model(sequences[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


def token_losses(model: Transformer, sequences: Int64[Tensor, "B S"]) -> Float[Tensor, "B S-1"]:
    """The loss in nats of every prediction by itself."""
    logits = model(sequences[:, :-1]).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), sequences[:, 1:], reduction="none")
