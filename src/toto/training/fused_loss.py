"""Output layer and cross-entropy as one: logits exist for some rows at a time, never all of them.

The gradients of the hidden states and of the weight are made while the logits are there, in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from toto.runtime.device import product_dtype

ROWS = {"cpu": 1024, "cuda": 4096}  # of logits in a matrix product
SOFTMAX_ROWS = {"cpu": 64, "cuda": 4096}  # in fp32 at a time, so that a processor keeps them in its cache
PADDED_TO = {"cuda": 64}  # the vocabulary, where products of other sizes are slow


def linear_cross_entropy(
    hidden_states: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    targets: Int64[Tensor, " T"],
    *,
    rows: int | None = None,
    padded_to: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
    """The mean of `cross_entropy(hidden_states @ weight.T, targets)`, and all of them, in nats.

    Products run in autocast's precision, the softmax in fp32. Only the mean can be differentiated, and once.

    Args:
        hidden_states: what the output layer is given.
        weight: the output layer's.
        targets: the right id of each row.
        rows: how many rows have logits at a time; by device where it is None.
        padded_to: the products see a vocabulary of a multiple of this; by device where it is None.
    """
    device = hidden_states.device.type
    rows = rows or ROWS.get(device, ROWS["cuda"])
    padded_to = padded_to or PADDED_TO.get(device, 1)
    mean, each = _LinearCrossEntropy.apply(hidden_states, weight, targets, rows, padded_to)  # type: ignore[no-untyped-call]
    return mean, each


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, rows: int, padded_to: int
    ) -> tuple[Tensor, Tensor]:
        precision = product_dtype(hidden_states)
        T, V = hidden_states.shape[0], weight.shape[0]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        weight_VD = weight.to(precision)
        if V % padded_to:
            weight_VD = F.pad(weight_VD, (0, 0, 0, -V % padded_to))
        each = hidden_states.new_empty(T, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden_states) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        parts = max(1, -(-T // rows))
        for part in range(parts):
            place = slice(T * part // parts, T * (part + 1) // parts)
            x_TD = hidden_states[place].to(precision)
            logits_TV = x_TD @ weight_VD.T
            _to_gradients(logits_TV, targets[place], each[place], V, differentiated=wants_hidden or wants_weight)
            if grad_hidden is not None:
                torch.div(logits_TV @ weight_VD, T, out=grad_hidden[place])
            if grad_weight is not None:
                grad_weight.add_((logits_TV.T @ x_TD)[:V], alpha=1 / T)
        ctx.gradients = grad_hidden, grad_weight
        ctx.mark_non_differentiable(each)
        return each.mean(), each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(grads[0])
        return grad_hidden, grad_weight, None, None, None


def _to_gradients(all_logits: Tensor, targets: Tensor, each: Tensor, vocabulary: int, *, differentiated: bool) -> None:
    """Write the rows' losses, and put the gradients of their sum where the logits are."""
    all_logits[:, vocabulary:] = -torch.inf
    few = SOFTMAX_ROWS.get(all_logits.device.type, SOFTMAX_ROWS["cuda"])
    for logits, wanted, losses in zip(
        torch.split(all_logits, few), torch.split(targets, few), torch.split(each, few), strict=True
    ):
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        right = log_probabilities.gather(1, wanted[:, None])
        torch.neg(right[:, 0], out=losses)
        if differentiated:
            log_probabilities.exp_().scatter_add_(1, wanted[:, None], torch.full_like(right, -1.0))
            logits.copy_(log_probabilities)
