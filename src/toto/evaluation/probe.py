"""Linear read-outs of every layer at once: average pooling and attention pooling on frozen features.

All heads, of every layer, kind, learning rate and weight decay, learn together from one stream of features: each batch
is read once, and one step of all heads follows. The features are kept (`Features`) or made anew in every epoch
(`toto.evaluation.streaming`). Rate, decay and layer are chosen on a slice of the training clips; the test clips choose
nothing, and every point of the grid is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Int64
from torch import Tensor

from toto.evaluation.heads import POOLS, AttentionHead, AverageHead, Head, Moments, Pool, RunningMoments, StackedHeads
from toto.runtime.errors import ConfigError
from toto.runtime.progress import Progress
from toto.runtime.seed import integer, stream

WHERE = "probe data"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Which heads are trained, and how.

    Attributes:
        layers: that are probed, 0 the embedding's output; by default all.
        pools: average, attention or both.
        rates: learning rates tried for every layer and head.
        decays: weight decays of AdamW, tried with every rate.
        epochs: passes over the training features.
        batch: clips in a step.
        heads: of attention pooling; must divide the feature width. AIM has 12.
        queries: of attention pooling, whose results are averaged.
        qkv_bias: a bias on attention pooling's values.
        classifier_bias: a bias on the classifiers. AIM has none.
        standardise: take out the mean and deviation of all training clips, found before (`training-set`; a stream
            runs the trunk once more for it), or of each batch, in the end their running average, as AIM (`running`).
        validation: share of the training clips that choose rate, decay and layer.
        seed: of the slice, the order and the initial weights.
    """

    layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--layers"])] = ()
    pools: Annotated[tuple[Pool, ...], tyro.conf.arg(aliases=["--pools"])] = POOLS
    rates: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--rates"])] = (1e-3, 3e-3, 1e-2)
    decays: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--decays"])] = (1e-2,)
    epochs: int = 60
    batch: int = 64
    heads: int = 4
    queries: int = 1
    qkv_bias: bool = False
    classifier_bias: bool = True
    standardise: Literal["training-set", "running"] = "training-set"
    validation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pools", "rates", "decays"):
            if not getattr(self, name):
                raise ConfigError("needs at least one value", where=f"--{name}")
        for name, least in (("rates", math.ulp(0.0)), ("decays", 0.0)):
            wrong = [value for value in getattr(self, name) if not least <= value < math.inf]
            if wrong:
                raise ConfigError(f"must be {'positive' if least else '0 or more'}, is {wrong[0]}", where=f"--{name}")
        for name in ("epochs", "batch", "heads", "queries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", where=f"--probe.{name}")
        if not 0 < self.validation < 1:
            raise ConfigError(f"must lie between 0 and 1, is {self.validation}", where="--probe.validation")

    @property
    def settings(self) -> tuple[tuple[float, float], ...]:
        """Every (rate, decay)."""
        return tuple(product(self.rates, self.decays))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Features of some clips.

    Attributes:
        by_layer: layer -> `[clips, tokens, D]`.
        numbers: which clips they are of, `[clips]`: fewer than were asked for where some can't be read.
    """

    by_layer: dict[int, Tensor]
    numbers: Int64[Tensor, " clips"]


@runtime_checkable
class FeatureSource(Protocol):
    """Labelled clips whose features can be asked for, batch by batch."""

    @property
    def labels(self) -> Tensor:
        """Of all clips, `[clips]`."""

    def batches(self, groups: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Features of each group of clips in turn; `epoch` where they are for training, None to measure."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of some clips, kept: layer -> `[clips, tokens, D]`, in bf16, and their labels `[clips]`."""

    by_layer: dict[int, Tensor]
    labels: Int64[Tensor, " clips"]

    def batches(self, groups: Iterable[Tensor], epoch: int | None) -> Iterator[Batch]:
        """Rows of what is kept; the same in every epoch."""
        for numbers in groups:
            yield Batch(
                by_layer={layer: states[numbers] for layer, states in self.by_layer.items()},
                numbers=numbers,
            )


@dataclass(frozen=True, kw_only=True)
class ProbeScore:
    """One point of the grid.

    Attributes:
        layer: 0 is the embedding's output.
        pool: average or attention.
        rate: learning rate.
        decay: weight decay.
        validation: accuracy on the slice of the training clips that chooses.
        correct: for every test clip whether its label is the likeliest class, `[clips]`.
        among_five: whether it is among the likeliest five.
    """

    layer: int
    pool: Pool
    rate: float
    decay: float
    validation: float
    correct: Tensor
    among_five: Tensor


def train_probes(train: FeatureSource, test: FeatureSource, *, classes: int, config: ProbeConfig) -> list[ProbeScore]:
    """Train every head on every layer; returns the whole grid by layer, head, rate and decay.

    Raises:
        ConfigError: labels beyond the classes, a class without a training clip, nothing to test on, or too few clips
            to hold some back.
    """
    _check_labels(train.labels, test.labels, classes)
    kept, held = _split(train.labels, config)
    probes = Probes(classes=classes, config=config)
    probes.train(train, kept)
    validation, seen = probes.verdicts(train, held), probes.verdicts(test, torch.arange(len(test.labels)))
    return [
        ProbeScore(
            layer=layer,
            pool=pool,
            rate=rate,
            decay=decay,
            validation=float(validation[layer, pool].correct[copy].double().mean()),
            correct=seen[layer, pool].correct[copy],
            among_five=seen[layer, pool].among_five[copy],
        )
        for layer, pool in probes.heads
        for copy, (rate, decay) in enumerate(config.settings)
    ]


def best_by_layer(scores: Sequence[ProbeScore]) -> list[ProbeScore]:
    """For every (layer, head) the rate and decay with the best validation accuracy; the first of equals."""
    best: dict[tuple[int, Pool], ProbeScore] = {}
    for score in scores:
        known = best.setdefault((score.layer, score.pool), score)
        if score.validation > known.validation:
            best[score.layer, score.pool] = score
    return list(best.values())


def chosen(scores: Sequence[ProbeScore], pool: Pool) -> ProbeScore:
    """The point of the grid with the best validation accuracy; of equals that of the lowest layer."""
    return max((score for score in scores if score.pool == pool), key=lambda score: (score.validation, -score.layer))


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Of every copy of a head, for every clip that could be read: `[copies, clips]`."""

    correct: Tensor
    among_five: Tensor


@dataclass(kw_only=True)
class Probes:
    """All heads of all layers; they are made when the first features show the layers and their widths."""

    classes: int
    config: ProbeConfig
    heads: dict[tuple[int, Pool], StackedHeads] = field(default_factory=dict)
    moments: dict[tuple[int, Pool], Moments | RunningMoments] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None

    def train(self, source: FeatureSource, numbers: Tensor) -> None:
        """Every head, in every epoch, on these clips of a source; a batch of features serves all.

        A head's randomness depends on the seed, the layer and its kind alone, so all rates and decays begin alike.
        """
        config = self.config
        if config.standardise == "training-set":
            self._measure(source, numbers)
        each = len(_groups(numbers, config.batch))
        with Progress("probing", total=config.epochs * each, unit="batches") as progress:
            for epoch in range(config.epochs):
                order = stream(config.seed, "probe order", epoch).permutation(len(numbers))
                groups = _groups(numbers[torch.from_numpy(order)], config.batch)
                for place, batch in enumerate(source.batches(groups, epoch)):
                    if len(batch.numbers):
                        done = (epoch * each + place) / (config.epochs * each)
                        self._step(batch, source.labels[batch.numbers], share=(1 + math.cos(math.pi * done)) / 2)
                    progress.advance()

    @torch.inference_mode()
    def verdicts(self, source: FeatureSource, numbers: Tensor) -> dict[tuple[int, Pool], Verdicts]:
        """What all heads say of some clips, in the given order."""
        parts: dict[tuple[int, Pool], list[Tensor]] = {key: [] for key in self.heads}
        for batch in source.batches(_groups(numbers, self.config.batch), None):
            if not len(batch.numbers):
                continue
            labels = source.labels[batch.numbers]
            for layer, states in batch.by_layer.items():
                tokens = states.float()
                for pool in self.config.pools:
                    said = self.heads[layer, pool].logits(tokens, self.moments[layer, pool].standard())
                    five = said.topk(min(5, self.classes), dim=2).indices.cpu() == labels[:, None]
                    parts[layer, pool].append(torch.stack([five[..., 0], five.any(dim=2)]))
        if not any(parts.values()):
            raise ConfigError("no clip of a split could be read", where=WHERE, fix="look at the files")
        whole = {key: torch.cat(found, dim=2) for key, found in parts.items()}
        return {key: Verdicts(correct=found[0], among_five=found[1]) for key, found in whole.items()}

    def _measure(self, source: FeatureSource, numbers: Tensor) -> None:
        """Mean and deviation of what each head reads, over all training clips."""
        for batch in source.batches(_groups(numbers, self.config.batch), None):
            for layer, states in batch.by_layer.items():
                tokens = states.float()
                for pool in self.config.pools:
                    found = self.moments.setdefault((layer, pool), Moments())
                    assert isinstance(found, Moments)  # nothing else made them
                    found.add(_read_by(pool, tokens))

    def _step(self, batch: Batch, labels: Tensor, *, share: float) -> None:
        """One step of all heads at a share of their rates, which fall along half a cosine."""
        if self.optimizer is None:
            self._make(batch)
        assert self.optimizer is not None  # made above
        for layer, states in batch.by_layer.items():
            tokens, wanted = states.float(), labels.to(states.device)
            for pool in self.config.pools:
                heads, moments = self.heads[layer, pool], self.moments[layer, pool]
                if isinstance(moments, RunningMoments):
                    standard = moments.of_batch(_read_by(pool, tokens))
                else:
                    standard = moments.standard()
                logits = heads.logits(tokens, standard)
                losses = F.cross_entropy(logits.flatten(0, 1), wanted.repeat(heads.copies), reduction="none")
                losses.view(heads.copies, -1).mean(dim=1).sum().backward()  # type: ignore[no-untyped-call]
        for group, (rate, _) in zip(self.optimizer.param_groups, self.config.settings, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        for heads in self.heads.values():
            heads.zero_grad()

    def _make(self, batch: Batch) -> None:
        """The heads for features like these, and their optimizer: a group for every rate and decay."""
        for (layer, states), pool in product(batch.by_layer.items(), self.config.pools):
            head = new_head(layer, pool, states.shape[2], self.classes, self.config)
            copies = len(self.config.settings)
            self.heads[layer, pool] = StackedHeads(head, copies, device=states.device)
            self.moments.setdefault((layer, pool), RunningMoments())
        groups = [
            {
                "params": [each for heads in self.heads.values() for each in heads.parameters_of(copy)],
                "lr": rate,
                "weight_decay": decay,
            }
            for copy, (rate, decay) in enumerate(self.config.settings)
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)


def new_head(layer: int, pool: Pool, width: int, classes: int, config: ProbeConfig) -> Head:
    """The head of a layer as it is before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer(config.seed, "probe", layer, pool))
        if pool == "average":
            return AverageHead(width, classes, classifier_bias=config.classifier_bias)
        return AttentionHead(
            width,
            classes,
            config.heads,
            queries=config.queries,
            qkv_bias=config.qkv_bias,
            classifier_bias=config.classifier_bias,
        )


def _read_by(pool: Pool, tokens: Tensor) -> Tensor:
    """What a head standardises, as rows: the tokens, or their mean."""
    return tokens.mean(dim=1) if pool == "average" else tokens.flatten(0, 1)


def _groups(numbers: Tensor, size: int) -> list[Tensor]:
    """Clips in groups of a size; a last group of one joins the one before, since it has no deviation."""
    groups = list(torch.split(numbers, size))
    if len(groups) > 1 and len(groups[-1]) == 1 and size > 1:
        groups[-2:] = [torch.cat(groups[-2:])]
    return groups


def _check_labels(train: Tensor, test: Tensor, classes: int) -> None:
    """Refuse labels that are no class, and splits that can't teach or measure."""
    for name, labels in (("training", train), ("test", test)):
        if not len(labels):
            raise ConfigError(f"there are no {name} clips", where=WHERE, fix="name a split that has some")
        beyond = labels[(labels < 0) | (labels >= classes)]
        if len(beyond):
            what = f"{len(beyond)} {name} labels lie beyond the {classes} classes (the first: {int(beyond[0])})"
            raise ConfigError(what, where=WHERE, fix="labels count from 0")
    absent = sorted(set(range(classes)) - set(train.tolist()))
    if absent:
        raise ConfigError(f"classes {absent} have no training clip", where=WHERE, fix="add clips or drop them")


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
        raise ConfigError("a class has a single training clip", where=WHERE, fix="give at least two of each")
    return torch.tensor(sorted(kept)), torch.tensor(sorted(held))
