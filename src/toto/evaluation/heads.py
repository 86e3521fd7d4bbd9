"""Heads that read frozen features, and many copies of one head that learn side by side from one stream of them.

The attention head is AIM's (apple/ml-aim, aim-v1): learned queries, keys and values, several heads, the mean over the
queries, a linear classifier. As a query is the same for all clips, it is multiplied into the key matrix first, and the
value matrix is applied after pooling: the same numbers, for a small part of the work. For the same reason a key's bias
could change nothing (it adds one number to all scores of a query), so there is none.

What a head reads is standardised, tokens or their mean; that, too, is folded into the query and into what was pooled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toto.runtime.errors import ConfigError

Pool = Literal["average", "attention"]
POOLS: tuple[Pool, ...] = ("average", "attention")
EPSILON = 1e-6  # AIM's batch norm
MOMENTUM = 0.1  # torch's batch norm


@dataclass(frozen=True, kw_only=True)
class Standard:
    """What is taken out of features before a head reads them."""

    mean: Float[Tensor, " D"]
    deviation: Float[Tensor, " D"]


class AverageHead(nn.Module):
    """Mean over tokens, then a linear layer."""

    def __init__(self, width: int, classes: int, *, classifier_bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(width, classes, bias=classifier_bias)

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits of clips."""
        out: Tensor = self.linear(tokens.mean(dim=1))
        return out


class AttentionHead(nn.Module):
    """Learned queries attend over the tokens with several heads; the mean over queries; then a linear layer.

    Args:
        width: of the features.
        classes: how many.
        heads: must divide the width.
        queries: how many are averaged.
        qkv_bias: a bias on the values (AIM's option of that name).
        classifier_bias: a bias on the classifier.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        heads: int,
        *,
        queries: int = 1,
        qkv_bias: bool = False,
        classifier_bias: bool = True,
    ):
        super().__init__()
        if width % heads:
            raise ConfigError(f"{heads} heads don't divide a feature width of {width}", where="--probe.heads")
        self.heads, self.head_size = heads, width // heads
        self.query = nn.Parameter(torch.randn(queries * heads, self.head_size) * 0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=qkv_bias)
        self.linear = nn.Linear(width, classes, bias=classifier_bias)

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits of clips."""
        weights = torch.matmul(self.folded_query(), tokens.transpose(1, 2)).softmax(dim=2)
        pooled = torch.matmul(weights, tokens)
        return self.classify(pooled.view(len(tokens), -1, self.heads, pooled.shape[2]).mean(dim=1))

    def folded_query(self) -> Float[Tensor, "queries_x_heads D"]:
        """The queries through the key matrix, scaled: the product with a token is the token's score."""
        keys = self.key.weight.view(self.heads, self.head_size, -1)
        queries = self.query.view(-1, self.heads, self.head_size)
        folded: Tensor = torch.einsum("qhk,hkd->qhd", queries, keys) * self.head_size**-0.5
        return folded.flatten(0, 1)

    def classify(self, pooled: Float[Tensor, "B heads D"]) -> Float[Tensor, "B classes"]:
        """Logits from the tokens' means under each head's attention."""
        values = torch.einsum("bhd,hkd->bhk", pooled, self.value.weight.view(self.heads, self.head_size, -1)).flatten(1)
        out: Tensor = self.linear(values if self.value.bias is None else values + self.value.bias)
        return out


Head = AverageHead | AttentionHead


class StackedHeads:
    """Copies of one head that begin alike, read the same tokens once for all, and learn each by itself.

    Args:
        head: what they are copies of.
        copies: R.
        device: where they learn.
    """

    def __init__(self, head: Head, copies: int, *, device: torch.device | str = "cpu"):
        self.head, self.copies = head, copies
        self.stacked: dict[str, Tensor] = {}
        for name, parameter in head.named_parameters():
            each = parameter.detach().to(device).expand(copies, *parameter.shape).clone().requires_grad_()
            each.grad = torch.zeros_like(each)
            self.stacked[name] = each

    def parameters_of(self, copy: int) -> list[Tensor]:
        """The parameters of one copy, and in their `grad` its gradients: views of the stacked ones."""
        views = []
        for stacked in self.stacked.values():
            assert stacked.grad is not None  # made beside it
            view = stacked.detach()[copy].requires_grad_()
            view.grad = stacked.grad[copy]
            views.append(view)
        return views

    def zero_grad(self) -> None:
        """Forget the gradients, where they lie."""
        for stacked in self.stacked.values():
            assert stacked.grad is not None  # made beside it
            stacked.grad.zero_()

    def one(self, copy: int) -> Head:
        """A copy as a module of its own; it takes standardised tokens."""
        self.head.load_state_dict({name: stacked[copy] for name, stacked in self.stacked.items()})
        return self.head

    def logits(self, tokens: Float[Tensor, "B tokens D"], standard: Standard) -> Float[Tensor, "R B classes"]:
        """Logits of every copy from raw tokens."""
        if isinstance(self.head, AverageHead):
            read = (tokens.mean(dim=1) - standard.mean) / standard.deviation
            return self._classified(read.expand(self.copies, *read.shape))
        return self._classified(self._attended(self.head, tokens, standard))

    def _attended(self, head: AttentionHead, tokens: Tensor, standard: Standard) -> Float[Tensor, "R B D"]:
        """Values under every copy's attention, `[R, B, D]`."""
        heads, size = head.heads, head.head_size
        keys = self.stacked["key.weight"].view(self.copies, heads, size, -1)
        queries = self.stacked["query"].view(self.copies, -1, heads, size)
        folded = torch.einsum("rqhk,rhkd->rqhd", queries, keys) * size**-0.5 / standard.deviation
        weights = F.linear(tokens, folded.flatten(0, 2)).transpose(1, 2).softmax(dim=2)
        seen = torch.matmul(weights, tokens)
        pooled = seen.view(len(tokens), self.copies, -1, heads, seen.shape[2]).mean(dim=2)
        pooled = (pooled - standard.mean) / standard.deviation
        values = self.stacked["value.weight"].view(self.copies, heads, size, -1)
        read = torch.einsum("brhd,rhkd->rbhk", pooled, values).flatten(2)
        bias = self.stacked.get("value.bias")
        return read if bias is None else read + bias[:, None]

    def _classified(self, read: Float[Tensor, "R B D"]) -> Float[Tensor, "R B classes"]:
        out = torch.bmm(read, self.stacked["linear.weight"].transpose(1, 2))
        bias = self.stacked.get("linear.bias")
        return out if bias is None else out + bias[:, None]


class Moments:
    """Mean and variance of everything that was added, by merging those of its parts in fp64."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(0), torch.zeros(0)

    def add(self, rows: Float[Tensor, "rows D"]) -> None:
        """Take in some more vectors."""
        mean, variance = (part.double() for part in _moments(rows))
        if not self.count:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        total, shift = self.count + len(rows), mean - self.mean
        self.squares += variance * len(rows) + shift.square() * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def standard(self) -> Standard:
        """Mean and deviation of all of it."""
        variance = self.squares / max(1, self.count)
        return Standard(mean=self.mean.float(), deviation=(variance + EPSILON).sqrt().float())


class RunningMoments:
    """What a batch norm without parameters keeps: in training a batch's own moments, later their running average."""

    def __init__(self) -> None:
        self.norm: nn.BatchNorm1d | None = None

    def of_batch(self, rows: Float[Tensor, "rows D"]) -> Standard:
        """The batch's own mean and deviation; the running ones move towards them."""
        mean, variance = _moments(rows)
        if self.norm is None:
            self.norm = nn.BatchNorm1d(rows.shape[1], eps=EPSILON, affine=False).to(rows.device)
        kept_mean, kept_variance = self.norm.get_buffer("running_mean"), self.norm.get_buffer("running_var")
        kept_mean.lerp_(mean, MOMENTUM)
        kept_variance.lerp_(variance * (len(rows) / max(1, len(rows) - 1)), MOMENTUM)
        return Standard(mean=mean, deviation=(variance + EPSILON).sqrt())

    def standard(self) -> Standard:
        """The running mean and deviation."""
        assert self.norm is not None  # nothing is read before a batch was
        variance = self.norm.get_buffer("running_var")
        return Standard(mean=self.norm.get_buffer("running_mean"), deviation=(variance + EPSILON).sqrt())


def _moments(rows: Float[Tensor, "rows D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and variance by the kernel of torch's batch norm: an order of magnitude faster than `var_mean` on a CPU."""
    _, mean, inverse = torch.native_batch_norm(rows, None, None, None, None, True, 0.0, EPSILON)
    return mean, (inverse.pow(-2) - EPSILON).clamp_min(0)
