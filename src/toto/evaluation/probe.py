"""Linear read-outs of every layer at once: average pooling and attention pooling on frozen features.

One pass of the trunk over the clips gives the features of all layers. On them, for every layer, both heads are
trained at several learning rates; each (layer, head) keeps the rate that is best on a slice of the training clips,
and the layer that the result names is chosen on that slice too. The test clips choose nothing.

The attention head is AIM's (apple/ml-aim): one learned query, keys and values without bias, several heads, then a
linear classifier; tokens are standardised by a batch norm without parameters (eps 1e-6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.runtime.errors import ConfigError
from toto.runtime.progress import Progress
from toto.runtime.seed import integer, stream

Pool = Literal["average", "attention"]
POOLS: tuple[Pool, ...] = ("average", "attention")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How the heads are trained.

    Attributes:
        rates: learning rates tried for every layer and head.
        epochs: passes over the training features.
        batch: clips in a step.
        weight_decay: AdamW's.
        heads: of attention pooling; must divide the feature width.
        validation: share of the training clips that choose rate and layer.
        seed: of the slice, the order and the initial weights.
    """

    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    epochs: int = 30
    batch: int = 64
    weight_decay: float = 1e-2
    heads: int = 4
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of some clips: layer -> `[clips, tokens, D]`, kept in bf16, and their labels `[clips]`."""

    by_layer: dict[int, Tensor]
    labels: Int64[Tensor, " clips"]


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """One (layer, head) at its chosen rate.

    Attributes:
        layer: 0 is the embedding's output.
        pool: average or attention.
        rate: the learning rate chosen on the validation slice.
        validation: accuracy there.
        correct: for every test clip whether it was classified right.
    """

    layer: int
    pool: Pool
    rate: float
    validation: float
    correct: Tensor


def train_probes(train: Features, test: Features, *, classes: int, config: ProbeConfig) -> list[ProbeScore]:
    """Train every head on every layer; returns scores by layer and head.

    Raises:
        ConfigError: a class without a training clip, or too few clips to hold some back.
    """
    absent = sorted(set(range(classes)) - set(train.labels.tolist()))
    if absent:
        raise ConfigError(f"classes {absent} have no training clip", where="probe data", fix="add clips or drop them")
    kept, slice_ = _split(train.labels, config)
    scores = []
    layers = list(train.by_layer)
    with Progress("probing", total=len(layers), unit="layers") as progress:
        for layer in layers:
            fit, held, seen = (
                (train.by_layer[layer][kept], train.labels[kept]),
                (train.by_layer[layer][slice_], train.labels[slice_]),
                (test.by_layer[layer], test.labels),
            )
            for pool in POOLS:
                scores.append(_best_of_rates(layer, pool, fit, held, seen, classes, config))
            progress.advance()
    return scores


def chosen(scores: list[ProbeScore], pool: Pool) -> ProbeScore:
    """The layer with the best validation accuracy; the lowest of equals."""
    return max((score for score in scores if score.pool == pool), key=lambda score: (score.validation, -score.layer))


class AverageHead(nn.Module):
    """Mean over tokens, batch norm without parameters, linear."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits of clips."""
        out: Tensor = self.linear(self.norm(tokens.mean(dim=1)))
        return out


class AttentionHead(nn.Module):
    """A learned query attends over the tokens; then a linear layer."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        if width % heads:
            raise ConfigError(f"{heads} heads don't divide a feature width of {width}", where="probe.heads")
        self.heads = heads
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(1, heads, 1, width // heads) * 0.02)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits of clips."""
        B, count, D = tokens.shape
        normed = self.norm(tokens.flatten(0, 1)).view(B, count, D)
        keys, values = self.key_value(normed).view(B, count, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        pooled = F.scaled_dot_product_attention(self.query.expand(B, -1, -1, -1), keys, values)
        out: Tensor = self.linear(pooled.flatten(1))
        return out


def _best_of_rates(
    layer: int,
    pool: Pool,
    fit: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
    classes: int,
    config: ProbeConfig,
) -> ProbeScore:
    best: ProbeScore | None = None
    for rate in config.rates:
        head = _fit(layer, pool, fit, classes, rate, config)
        score = float(_correct(head, held, config.batch).double().mean())
        if best is None or score > best.validation:
            correct = _correct(head, seen, config.batch)
            best = ProbeScore(layer=layer, pool=pool, rate=rate, validation=score, correct=correct)
    assert best is not None
    return best


def _fit(
    layer: int, pool: Pool, fit: tuple[Tensor, Tensor], classes: int, rate: float, config: ProbeConfig
) -> AverageHead | AttentionHead:
    """Train one head; its randomness depends on the seed, the layer and the head alone."""
    tokens, labels = fit
    width = tokens.shape[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer(config.seed, "probe", layer, pool))
        head = AverageHead(width, classes) if pool == "average" else AttentionHead(width, classes, config.heads)
    if pool == "average":  # the mean over tokens never changes, so it is taken once
        tokens = tokens.float().mean(dim=1, keepdim=True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(labels) // config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(config.epochs):
        order = torch.from_numpy(stream(config.seed, "probe order", epoch).permutation(len(labels)))
        for batch in torch.split(order, config.batch):
            if len(batch) == 1:  # batch norm has no statistics of one clip
                continue
            loss = F.cross_entropy(head(tokens[batch].float()), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return head.eval()


@torch.inference_mode()
def _correct(head: nn.Module, clips: tuple[Tensor, Tensor], batch: int) -> Tensor:
    """For every clip whether the head says its label."""
    tokens, labels = clips
    said = [head(part.float()).argmax(dim=1) for part in torch.split(tokens, batch)]
    return torch.cat(said) == labels


def _split(labels: Tensor, config: ProbeConfig) -> tuple[Tensor, Tensor]:
    """Training clips kept for fitting and held back for choosing, each class in proportion."""
    kept: list[int] = []
    held: list[int] = []
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label)[:, 0].tolist()
        order = stream(config.seed, "validation", label).permutation(len(members))
        count = max(1, round(config.validation * len(members)))
        held += [members[i] for i in order[:count]]
        kept += [members[i] for i in order[count:]]
    if not kept or len(set(labels.tolist())) > len(set(labels[kept].tolist())):
        raise ConfigError("a class has a single training clip", where="probe data", fix="give at least two of each")
    return torch.tensor(sorted(kept)), torch.tensor(sorted(held))
