"""Whole evaluations: a checkpoint and data in, a result record out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from toto.evaluation.features import TotoBackbone
from toto.evaluation.labelled import LabelledClips, extract
from toto.evaluation.likelihood import by_part, fit_baselines, measure_bits, spread_windows
from toto.evaluation.patch_error import measure_errors
from toto.evaluation.probe import POOLS, ProbeConfig, ProbeScore, chosen, train_probes
from toto.evaluation.result import Metric, Result, bootstrap
from toto.model.transformer import Transformer
from toto.model.weights import Card, load_card, load_model, weights_sha256
from toto.runtime.device import Precision, pick_device
from toto.runtime.errors import ConfigError
from toto.runtime.provenance import as_plain
from toto.tokens.passport import Passport
from toto.tokens.shards import TokenStore
from toto.training.mixture import SourceConfig, Window


def probe(
    backbone: TotoBackbone,
    train: LabelledClips,
    test: LabelledClips,
    *,
    config: ProbeConfig,
    checkpoint: str | Path,
    batch: int = 8,
) -> Result:
    """Probe every layer of a checkpoint with both heads; the record names the layer the validation slice chose."""
    fit, seen = extract(backbone, train, batch=batch), extract(backbone, test, batch=batch)
    scores = train_probes(fit.features, seen.features, classes=len(train.classes), config=config)
    metrics = {}
    for pool in POOLS:
        best = chosen(scores, pool)
        metrics[f"{pool}_accuracy"] = _accuracy(best)
    counts = np.bincount(seen.features.labels.numpy(), minlength=len(train.classes))
    metrics["chance"] = Metric(value=1 / len(train.classes))
    failed = len(seen.failed)
    return Result(
        task="probe",
        protocol={
            "train": train.name,
            "test": test.name,
            "train_clips": len(fit.features.labels),
            "classes": list(train.classes),
            "frames": backbone.frames if test.modality == "video" else 1,
            "frame_size": backbone.frame_size,
            "precision": backbone.precision,
            **as_plain(config),
        },
        metrics=metrics,
        offered=len(test.labels),
        evaluated=len(seen.features.labels),
        failed=failed,
        model_sha256=weights_sha256(checkpoint),
        passport=load_card(checkpoint).passport,
        details={
            "by_layer": [_row(score) for score in scores],
            "chosen_layer": {pool: chosen(scores, pool).layer for pool in POOLS},
            "largest_class": float(counts.max() / counts.sum()),
            "failures": [as_plain(row) for row in (*fit.failed, *seen.failed)],
        },
    )


def bits(
    checkpoint: str | Path,
    *,
    train: tuple[SourceConfig, ...],
    heldout: tuple[SourceConfig, ...],
    most: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
) -> Result:
    """Held-out bits per visual token of a checkpoint, and of unigram and copying fitted on the training shards.

    Raises:
        PassportError: shards that another tokenizer made.
        ConfigError: the checkpoint predicts pixels.
    """
    card, model = load_card(checkpoint), load_model(checkpoint, device=pick_device(device))
    if model.config.targets != "codes":
        raise ConfigError("predicts pixels, not codes", where=checkpoint, fix="use `toto evaluate patches`")
    _require_passport(card, checkpoint, (*train, *heldout))
    windows = _windows(model, card, heldout, most)
    baselines = fit_baselines([TokenStore(source.path) for source in train])
    found = measure_bits(model, windows, baselines, precision=precision)
    metrics = {name: Metric(value=value) for name, value in found.summary().items()}
    for name in ("model", "unigram", "copy"):
        metrics[f"{name}_bits"] = bootstrap(getattr(found, name).mean(dim=1).numpy())
    if found.model.shape[1] > 1:
        won = (found.copy - found.model)[:, 1:].mean(dim=1)
        metrics["gain_over_copy_later_frames"] = bootstrap(won.numpy())
    return Result(
        task="bits",
        protocol={
            "train": [as_plain(source) for source in train],
            "heldout": [as_plain(source) for source in heldout],
            "frames": card.sequence["frames"],
            "windows": len(windows),
            "copy_rate": baselines.copy_rate,
            "precision": precision,
        },
        metrics=metrics,
        offered=len(windows),
        evaluated=len(windows),
        failed=0,
        model_sha256=weights_sha256(checkpoint),
        passport=card.passport,
        details={
            f"{name}_by_frame": getattr(found, name).mean(dim=0).tolist() for name in ("model", "unigram", "copy")
        },
    )


def patch_errors(
    checkpoint: str | Path,
    *,
    heldout: tuple[SourceConfig, ...],
    most: int = 256,
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
    windows = _windows(model, card, heldout, most)
    found = measure_errors(model, windows, precision=precision)
    curves = {"model": found.model, "mean": found.mean, "copy": found.copy}
    metrics: dict[str, Metric] = {}
    for name, values in curves.items():
        metrics |= {part: Metric(value=value) for part, value in by_part(f"{name}_error", values).items()}
        metrics[f"{name}_error"] = bootstrap(values.mean(dim=1).numpy())
    if found.model.shape[1] > 1:
        metrics["gain_over_copy_later_frames"] = bootstrap((found.copy - found.model)[:, 1:].mean(dim=1).numpy())
    return Result(
        task="patches",
        protocol={
            "heldout": [as_plain(source) for source in heldout],
            "frames": card.sequence["frames"],
            "windows": len(windows),
            "patch_values": model.config.values_in_patch,
            "precision": precision,
        },
        metrics=metrics,
        offered=len(windows),
        evaluated=len(windows),
        failed=0,
        model_sha256=weights_sha256(checkpoint),
        passport=card.passport,
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


def _windows(model: Transformer, card: Card, sources: tuple[SourceConfig, ...], most: int) -> list[Window]:
    """Held-out windows of some sources, with pixels where the model takes patches."""
    frames, pixels = card.sequence["frames"], model.config.inputs == "patches"
    return [window for each in sources for window in spread_windows(each, frames=frames, most=most, pixels=pixels)]


def _accuracy(score: ProbeScore) -> Metric:
    return bootstrap(score.correct.double().numpy())


def _row(score: ProbeScore) -> dict[str, Any]:
    accuracy = _accuracy(score)
    return {
        "layer": score.layer,
        "pool": score.pool,
        "rate": score.rate,
        "validation": score.validation,
        "test": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
    }
