"""Whole evaluations: a checkpoint and data in, a result record out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toto.evaluation.feature_cache import CacheConfig, FeatureCache
from toto.evaluation.features import Backbone
from toto.evaluation.finetune_config import Augmentation
from toto.evaluation.labelled import Extracted, LabelledClips, extract
from toto.evaluation.likelihood import by_part, fit_baselines, measure_bits, spread_windows
from toto.evaluation.patch_error import measure_errors
from toto.evaluation.probe import FeatureSource, ProbeConfig, ProbeScore, best_by_layer, chosen, train_probes
from toto.evaluation.result import Metric, Result, bootstrap, bootstrap_each
from toto.evaluation.streaming import StreamedFeatures
from toto.media.ledger import LedgerRow, count_by_status, in_order_of_severity
from toto.model.causal import CausalModel
from toto.model.weights import Card, load_card, load_model, weights_sha256
from toto.runtime.device import Precision, pick_device
from toto.runtime.errors import ConfigError
from toto.runtime.provenance import as_plain
from toto.tokens.accounts import count_inputs
from toto.tokens.passport import Passport
from toto.tokens.shard_tools import whole_id
from toto.tokens.shards import TokenStore
from toto.training.source import SourceConfig, Window

FAILED = ("short", "corrupt")  # what should have been evaluated and could not


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """How the features of a probe come to its heads.

    Attributes:
        features: `kept` after one pass of the trunk, or `streamed`: the trunk runs in every epoch.
        augmentation: of streamed training clips; None shows their centre.
        batch: clips in one pass of the trunk.
        cache: keep them on disk, for the next time; None keeps them in memory.
    """

    features: Literal["kept", "streamed"] = "kept"
    augmentation: Augmentation | None = None
    batch: int = 8
    cache: CacheConfig | None = None

    def __post_init__(self) -> None:
        if self.augmentation is not None and self.features == "kept":
            raise ConfigError("kept features are of one view", where="--augment", fix="add --features streamed")
        if self.cache is not None and self.features == "streamed":
            raise ConfigError("streamed features are not kept", where="--cache", fix="leave --features streamed out")


@dataclass(frozen=True, kw_only=True)
class ProbeSide:
    """Clips, the source of their features, and what became of them, which is known once all were read."""

    clips: LabelledClips
    source: FeatureSource
    ledger: Callable[[], tuple[LedgerRow, ...]]

    @classmethod
    def kept(cls, clips: LabelledClips, extracted: Extracted) -> ProbeSide:
        """Of features that are there."""
        return cls(clips=clips, source=extracted.features, ledger=lambda: extracted.ledger)

    @classmethod
    def streamed(cls, source: StreamedFeatures) -> ProbeSide:
        """Of features that are made when they are asked for."""
        return cls(clips=source.clips, source=source, ledger=source.ledger)


def probe(
    backbone: Backbone,
    train: LabelledClips,
    test: LabelledClips,
    *,
    config: ProbeConfig,
    data: ProbeData | None = None,
    task: str = "probe",
) -> Result:
    """Probe every layer of a backbone with all heads; the record names the layer the validation slice chose."""
    _require_classes(train)
    how = data or ProbeData()
    if config.layers:
        backbone.select(config.layers)
    if how.features == "kept":
        cache = None
        if how.cache is not None:
            cache = FeatureCache(how.cache, name=backbone.name, identity=backbone.identity())
        sides = [
            ProbeSide.kept(clips, extract(backbone, clips, batch=how.batch, cache=cache)) for clips in (train, test)
        ]
    else:
        views = (how.augmentation, None)
        sides = [
            ProbeSide.streamed(
                StreamedFeatures(
                    backbone=backbone, clips=clips, batch=how.batch, augmentation=augmentation, seed=config.seed
                )
            )
            for clips, augmentation in zip((train, test), views, strict=True)
        ]
    return probe_sides(backbone, *sides, config=config, data=how, task=task)


def _require_classes(train: LabelledClips) -> None:
    """Refuse, before anything is computed, classes that can't be learnt and chosen for."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if len(counts) < 2:
        raise ConfigError(f"has one class, {train.classes[0]}", where=train.name, fix="give two, or more")
    few = [name for name, count in zip(train.classes, counts, strict=False) if count < 2]
    if few:
        what = f"fewer than two training items of class {', '.join(few[:8])}, one of which is held back"
        raise ConfigError(what, where=train.name, fix="add items, or drop the class")


def probe_sides(
    backbone: Backbone, train: ProbeSide, test: ProbeSide, *, config: ProbeConfig, data: ProbeData, task: str = "probe"
) -> Result:
    """The same for features that are there, or that somebody makes."""
    scores = train_probes(train.source, test.source, classes=len(train.clips.classes), config=config)
    return _probe_record(backbone, scores, train, test, config=config, data=data, task=task)


def _probe_record(
    backbone: Backbone,
    scores: list[ProbeScore],
    train: ProbeSide,
    test: ProbeSide,
    *,
    config: ProbeConfig,
    data: ProbeData,
    task: str,
) -> Result:
    """What the scores say, over what, and how they came about."""
    rows = {"train": train.ledger(), "test": test.ledger()}
    counts = {name: count_by_status(each) for name, each in rows.items()}
    classes = train.clips.classes
    read = zip(test.clips.labels, rows["test"], strict=False)  # the ledger goes on with what is no clip
    labels = np.array([label for label, row in read if row.status == "ok"])
    denominators = Denominators.of(counts["test"], evaluated=len(labels))
    best = best_by_layer(scores)
    values = np.stack([score.correct.double().numpy() for score in best], axis=1)
    accuracies = bootstrap_each(values, failed=denominators.failed)
    metrics: dict[str, Metric] = {}
    for pool in config.pools:
        winner = chosen(scores, pool)
        metrics[f"{pool}_accuracy"] = accuracies[[score is winner for score in best].index(True)]
        if len(classes) > 5:
            metrics[f"{pool}_top5"] = bootstrap(winner.among_five.double().numpy(), failed=denominators.failed)
    metrics["chance"] = Metric(value=1 / len(classes))
    of_classes = np.bincount(labels, minlength=len(classes))
    return Result(
        task=task,
        protocol={
            "backbone": backbone.name,
            "train": train.clips.name,
            "test": test.clips.name,
            "train_clips": counts["train"].get("ok", 0),
            "classes": list(classes),
            "frames": backbone.frames if test.clips.modality == "video" else 1,
            "frame_size": backbone.frame_size,
            "precision": backbone.precision,
            "features": data.features,
            "augmentation": None if data.augmentation is None else as_plain(data.augmentation),
            **as_plain(config),
        },
        metrics=metrics,
        offered=denominators.offered,
        evaluated=denominators.evaluated,
        failed=denominators.failed,
        skipped=denominators.skipped,
        model_sha256=backbone.weights_sha256,
        passport=backbone.passport,
        ledger=counts,
        details={
            "by_layer": [_row(score) | _interval(metric) for score, metric in zip(best, accuracies, strict=True)],
            "grid": [_row(score) for score in scores],
            "chosen_layer": {pool: chosen(scores, pool).layer for pool in config.pools},
            "largest_class": float(of_classes.max() / of_classes.sum()),
            "failures": [as_plain(row) for each in rows.values() for row in each if row.status != "ok"],
        },
    )


def bits(
    checkpoint: str | Path,
    *,
    train: tuple[SourceConfig, ...],
    heldout: tuple[SourceConfig, ...],
    most: int = 256,
    split: str | None = None,
    train_split: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Result:
    """Held-out bits per visual token of a checkpoint, and of unigram and copying fitted on the training shards.

    With `split` and `train_split`, of these splits of the held-out and of the training shards alone.

    Raises:
        PassportError: shards that another tokenizer made.
        ConfigError: the checkpoint predicts pixels.
    """
    card, model = load_card(checkpoint), load_model(checkpoint, device=pick_device(device))
    if model.config.targets != "codes":
        raise ConfigError("predicts pixels, not codes", where=checkpoint, fix="use `toto evaluate patches`")
    _require_passport(card, checkpoint, (*train, *heldout))
    held = _measured(model, card, heldout, most, split)
    baselines = fit_baselines([TokenStore(source.path) for source in train], split=train_split)
    found = measure_bits(model, held.windows, baselines, precision=precision)
    metrics = {name: Metric(value=value) for name, value in found.summary().items()}
    for name in ("model", "unigram", "copy"):
        metrics[f"{name}_bits"] = bootstrap(getattr(found, name).mean(dim=1).numpy())
    if found.model.shape[1] > 1:
        won = (found.copy - found.model)[:, 1:].mean(dim=1)
        metrics["gain_over_copy_later_frames"] = bootstrap(won.numpy())
    metrics["missing_share"] = missing_share(held.ledger)
    return Result(
        task="bits",
        protocol={
            "train": [as_plain(source) for source in train],
            "heldout": [as_plain(source) for source in heldout],
            "frames": card.sequence["frames"],
            "windows": len(held.windows),
            "split": split,
            "train_split": train_split,
            "copy_rate": baselines.copy_rate,
            "precision": precision,
        },
        metrics=metrics,
        offered=held.inputs.offered,
        evaluated=held.inputs.evaluated,
        failed=held.inputs.failed,
        skipped=held.inputs.skipped,
        model_sha256=weights_sha256(checkpoint),
        passport=card.passport,
        ledger={"heldout": held.ledger},
        details={
            f"{name}_by_frame": getattr(found, name).mean(dim=0).tolist() for name in ("model", "unigram", "copy")
        },
    )


def patch_errors(
    checkpoint: str | Path,
    *,
    heldout: tuple[SourceConfig, ...],
    most: int = 256,
    split: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> Result:
    """Held-out error of the patches that a checkpoint predicts, and of the mean and of copying.

    Raises:
        PassportError: shards that another tokenizer made.
        ConfigError: the checkpoint predicts codes, or the shards hold no pixels.
    """
    card, model = load_card(checkpoint), load_model(checkpoint, device=pick_device(device))
    if model.config.targets != "pixels":
        raise ConfigError("predicts codes, not pixels", where=checkpoint, fix="use `toto evaluate bits`")
    _require_passport(card, checkpoint, heldout)
    held = _measured(model, card, heldout, most, split)
    found = measure_errors(model, held.windows, precision=precision)
    curves = {"model": found.model, "mean": found.mean, "copy": found.copy}
    metrics: dict[str, Metric] = {}
    for name, values in curves.items():
        metrics |= {part: Metric(value=value) for part, value in by_part(f"{name}_error", values).items()}
        metrics[f"{name}_error"] = bootstrap(values.mean(dim=1).numpy())
    if found.model.shape[1] > 1:
        metrics["gain_over_copy_later_frames"] = bootstrap((found.copy - found.model)[:, 1:].mean(dim=1).numpy())
    metrics["missing_share"] = missing_share(held.ledger)
    return Result(
        task="patches",
        protocol={
            "heldout": [as_plain(source) for source in heldout],
            "frames": card.sequence["frames"],
            "windows": len(held.windows),
            "split": split,
            "patch_values": model.config.values_in_patch,
            "precision": precision,
        },
        metrics=metrics,
        offered=held.inputs.offered,
        evaluated=held.inputs.evaluated,
        failed=held.inputs.failed,
        skipped=held.inputs.skipped,
        model_sha256=weights_sha256(checkpoint),
        passport=card.passport,
        ledger={"heldout": held.ledger},
        details={f"{name}_by_frame": values.mean(dim=0).tolist() for name, values in curves.items()},
    )


def _require_passport(card: Card, checkpoint: str | Path, sources: tuple[SourceConfig, ...]) -> None:
    """Refuse shards that were made otherwise than those the checkpoint was trained on."""
    passport = Passport.from_dict(card.passport, where=str(checkpoint))
    for source in sources:
        passport.require_same(
            TokenStore(source.path).passport,
            where=str(source.path),
            fix="tokenize it as the model's data was",
        )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Held-out windows, what became of the inputs of their shards, and over how many of them the windows are."""

    windows: list[Window]
    ledger: dict[str, int]
    inputs: Denominators


def _measured(
    model: CausalModel, card: Card, sources: tuple[SourceConfig, ...], most: int, split: str | None
) -> _Measured:
    """Windows of some sources, with pixels where the model takes patches.

    A store that is named for its images and for its videos is two sources, whose inputs both count.
    """
    frames, pixels = card.sequence["frames"], model.config.inputs == "patches"
    windows: list[Window] = []
    counts: Counter[str] = Counter()
    evaluated = 0
    for source in sources:
        found = spread_windows(source, frames=frames, most=most, pixels=pixels, split=split)
        least = frames if source.modality == "video" else 1
        counts.update(count_inputs(TokenStore(source.path), source.modality, least=least, split=split))
        evaluated += len({whole_id(item) for window in found for item, _ in window.origin})
        windows += found
    ledger = in_order_of_severity(counts)
    return _Measured(windows=windows, ledger=ledger, inputs=Denominators.of(ledger, evaluated=evaluated))


def missing_share(ledger: dict[str, int]) -> Metric:
    """The share of the inputs that a sum of losses should be over and says nothing about."""
    counts = Denominators.of(ledger, evaluated=ledger.get("ok", 0))
    return Metric(value=counts.failed / max(1, counts.failed + counts.evaluated))


@dataclass(frozen=True, kw_only=True)
class Denominators:
    """How many inputs there were, and over how many of them a number is."""

    offered: int
    evaluated: int
    failed: int
    skipped: int

    @classmethod
    def of(cls, ledger: dict[str, int], *, evaluated: int) -> Denominators:
        """From the counts of a ledger: short and corrupt inputs failed, all others that weren't evaluated are skipped.

        >>> Denominators.of({"ok": 9, "short": 1, "corrupt": 2, "skipped": 3}, evaluated=4).skipped
        8
        """
        offered, failed = sum(ledger.values()), sum(ledger.get(status, 0) for status in FAILED)
        return cls(offered=offered, evaluated=evaluated, failed=failed, skipped=offered - evaluated - failed)


def _row(score: ProbeScore) -> dict[str, Any]:
    """A point of the grid as the record tells it."""
    return {
        "layer": score.layer,
        "pool": score.pool,
        "rate": score.rate,
        "decay": score.decay,
        "validation": score.validation,
        "test": float(score.correct.double().mean()),
        "top5": float(score.among_five.double().mean()),
    }


def _interval(accuracy: Metric) -> dict[str, Any]:
    return {"low": accuracy.low, "high": accuracy.high, "bound": accuracy.bound}
