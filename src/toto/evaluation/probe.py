"""Linear read-outs of every layer at once: average pooling and attention pooling on frozen features.

One pass of the trunk over the clips gives the features of all layers. On them, for every layer, both heads are
trained at several learning rates together; each (layer, head) keeps the rate that is best on a slice of the training
clips, and the layer that the result names is chosen on that slice too. The test clips choose nothing.

The attention head is AIM's (apple/ml-aim): one learned query, keys and values without bias, several heads, then a
linear classifier. What a head reads, tokens or their mean, is standardised with the training clips' mean and deviation
(AIM: a batch norm without parameters). As the query is the same for all clips, it is multiplied into the key matrix
first, and the value matrix is applied after pooling: the same numbers, for a small part of the work.
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
    epochs: int = 60
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
            states = train.by_layer[layer][kept], train.by_layer[layer][slice_], test.by_layer[layer]
            labels = train.labels[kept], train.labels[slice_], test.labels
            for pool in POOLS:
                parts = _standardised(tuple(_pooled(part, pool) for part in states))
                fit, held, seen = zip(parts, labels, strict=True)
                scores.append(_best_of_rates(layer, pool, fit, held, seen, classes, config))
            progress.advance()
    return scores


def chosen(scores: list[ProbeScore], pool: Pool) -> ProbeScore:
    """The layer with the best validation accuracy; the lowest of equals."""
    return max((score for score in scores if score.pool == pool), key=lambda score: (score.validation, -score.layer))


class AverageHead(nn.Module):
    """Mean over tokens, then a linear layer."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits of clips."""
        out: Tensor = self.linear(tokens.mean(dim=1))
        return out


class AttentionHead(nn.Module):
    """A learned query attends over the tokens with several heads; then a linear layer."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        if width % heads:
            raise ConfigError(f"{heads} heads don't divide a feature width of {width}", where="--probe.heads")
        self.heads, self.head_size = heads, width // heads
        self.query = nn.Parameter(torch.randn(heads, self.head_size) * 0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "B classes"]:
        """Logits of clips."""
        scores = torch.einsum("btd,hd->bht", tokens, self.folded_query())
        return self.classify(torch.einsum("bht,btd->bhd", scores.softmax(dim=-1), tokens))

    def folded_query(self) -> Float[Tensor, "heads D"]:
        """The query through the key matrix, scaled: its product with a token is the token's score."""
        keys = self.key.weight.view(self.heads, self.head_size, -1)
        folded: Tensor = torch.einsum("hk,hkd->hd", self.query, keys) * self.head_size**-0.5
        return folded

    def classify(self, pooled: Float[Tensor, "B heads D"]) -> Float[Tensor, "B classes"]:
        """Logits from the tokens' means under each head's attention."""
        values = torch.einsum("bhd,hkd->bhk", pooled, self.value.weight.view(self.heads, self.head_size, -1))
        out: Tensor = self.linear(values.flatten(1))
        return out


Head = AverageHead | AttentionHead


def _best_of_rates(
    layer: int,
    pool: Pool,
    fit: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
    classes: int,
    config: ProbeConfig,
) -> ProbeScore:
    """Train one head at every rate, and score the one that is best on the held-back clips."""
    heads = train_heads(layer, pool, *fit, classes=classes, config=config)
    accuracies = [float(_correct(head, held, config.batch).double().mean()) for head in heads]
    best = max(range(len(heads)), key=lambda number: (accuracies[number], -number))
    return ProbeScore(
        layer=layer,
        pool=pool,
        rate=config.rates[best],
        validation=accuracies[best],
        correct=_correct(heads[best], seen, config.batch),
    )


def train_heads(
    layer: int, pool: Pool, tokens: Tensor, labels: Tensor, *, classes: int, config: ProbeConfig
) -> list[Head]:
    """One head for every rate, trained together on standardised tokens; none influences another.

    A head's randomness depends on the seed, the layer and the kind of head alone, so all rates begin alike and see
    the same batches.
    """
    heads = [_new_head(layer, pool, tokens.shape[2], classes, config) for _ in config.rates]
    groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, config.rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    steps = config.epochs * -(-len(labels) // config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(config.epochs):
        order = torch.from_numpy(stream(config.seed, "probe order", epoch).permutation(len(labels)))
        for batch in torch.split(order, config.batch):
            logits = _logits_of_all(heads, tokens[batch].float())
            losses = F.cross_entropy(logits.flatten(0, 1), labels[batch].repeat(len(heads)), reduction="none")
            optimizer.zero_grad()
            losses.view(len(heads), -1).mean(dim=1).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return heads


def _new_head(layer: int, pool: Pool, width: int, classes: int, config: ProbeConfig) -> Head:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer(config.seed, "probe", layer, pool))
        return AverageHead(width, classes) if pool == "average" else AttentionHead(width, classes, config.heads)


def _logits_of_all(heads: list[Head], tokens: Float[Tensor, "B tokens D"]) -> Float[Tensor, "rates B classes"]:
    """Logits of every head, reading the tokens once for all of them."""
    attention = [head for head in heads if isinstance(head, AttentionHead)]
    if not attention:
        return torch.stack([head(tokens) for head in heads])
    queries = torch.cat([head.folded_query() for head in attention])
    weights = torch.matmul(tokens, queries.T).softmax(dim=1)
    pooled = torch.matmul(weights.transpose(1, 2), tokens).chunk(len(attention), dim=1)
    return torch.stack([head.classify(part) for head, part in zip(attention, pooled, strict=True)])


def _standardised(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Features of several splits, with the mean and deviation of the first one's taken out of all."""
    mean, deviation = parts[0].float().mean(dim=(0, 1)), parts[0].float().std(dim=(0, 1), correction=0).add(1e-6)
    return tuple(((part.float() - mean) / deviation).to(part.dtype) for part in parts)


def _pooled(tokens: Tensor, pool: Pool) -> Tensor:
    """For average pooling the mean over tokens, which never changes and so is taken once."""
    return tokens.float().mean(dim=1, keepdim=True) if pool == "average" else tokens


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
