"""Held-out bits per visual token, beside two honest baselines.

* Unigram: how often each code occurs in the training shards, whatever its place.
* Copy: with a probability fitted on the training shards, the code at the same place one frame ago; else the unigram.
  A first frame has nothing to copy and gets the unigram.

Both are probability distributions over all codes, with one added to every count, so bits compare with the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from toto.evaluation.patch_error import model_errors
from toto.model.causal import CausalModel
from toto.runtime.device import Precision, autocast
from toto.runtime.errors import ConfigError
from toto.tokens.accounts import is_split
from toto.tokens.shards import TokenStore
from toto.training.config import TrainConfig
from toto.training.mixture import patches_of, sequences_of
from toto.training.objective import token_losses
from toto.training.source import Source, SourceConfig, Window


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What the training shards say without a model.

    Attributes:
        unigram: probability of each code `[vocab_size]`.
        copy_rate: the fitted probability of copying.
    """

    unigram: Float[Tensor, " V"]
    copy_rate: float

    def bits(self, codes: Int64[Tensor, "T rows cols"]) -> tuple[Tensor, Tensor]:
        """Bits of every code under the unigram and under copying, each `[T, rows, cols]`."""
        chance = self.unigram[codes]
        copied = self.copy_rate * (codes[1:] == codes[:-1]) + (1 - self.copy_rate) * chance[1:]
        return -chance.log2(), -torch.cat([chance[:1], copied]).log2()


def fit_baselines(stores: list[TokenStore], *, split: str | None = None) -> Baselines:
    """Count the codes of some stores (of one split of them) and fit the rate of copying by maximum likelihood.

    The likelihood of the rate is concave; it is maximised by expectation-maximisation over the (at most vocab_size)
    different unigram probabilities of copied codes.
    """
    vocabulary = stores[0].passport.vocab_size
    counts, repeats, pairs = np.ones(vocabulary), np.zeros(vocabulary), 0
    for store in stores:
        for number in range(len(store)) if split is None else np.flatnonzero(is_split(store, split)).tolist():
            codes = store.codes(number).numpy()
            counts += np.bincount(codes.ravel(), minlength=vocabulary)
            same = codes[1:] == codes[:-1]
            repeats += np.bincount(codes[1:][same], minlength=vocabulary)
            pairs += same.size
    unigram = counts / counts.sum()
    rate = 0.5
    for _ in range(200 if pairs else 0):
        rate = float((repeats * rate / (rate + (1 - rate) * unigram)).sum() / pairs)
    rate = min(rate, 1 - 1e-6) if pairs else 0.0
    return Baselines(unigram=torch.from_numpy(unigram), copy_rate=rate)


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits per visual token of some windows, by window and frame.

    Attributes:
        model: `[windows, T]`.
        unigram: `[windows, T]`.
        copy: `[windows, T]`.
    """

    model: Float[Tensor, "windows T"]
    unigram: Float[Tensor, "windows T"]
    copy: Float[Tensor, "windows T"]

    def summary(self) -> dict[str, float]:
        """Means over all frames, over first frames and over later ones, for the model and both baselines."""
        parts = [by_part(f"{name}_bits", getattr(self, name)) for name in ("model", "unigram", "copy")]
        return parts[0] | parts[1] | parts[2]


def by_part(name: str, values: Float[Tensor, "windows T"]) -> dict[str, float]:
    """The mean of a measure over all frames, over first frames and over later ones, where there are any."""
    later = {f"{name}_later_frames": float(values[:, 1:].mean())} if values.shape[1] > 1 else {}
    return {name: float(values.mean()), f"{name}_first_frame": float(values[:, 0].mean())} | later


@torch.inference_mode()
def model_bits(
    model: CausalModel, windows: list[Window], *, batch: int = 8, precision: Precision = "auto"
) -> Float[Tensor, "windows T"]:
    """Bits per visual token of every frame of some windows; start and end tokens are not counted."""
    if not windows:
        raise ConfigError("no window to measure", where="held-out data", fix="give longer videos or a smaller T")
    parts: list[Tensor] = []
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        with autocast(precision, model.device):
            patches = patches_of(group, device=model.device)
            losses = token_losses(model, sequences_of(group).to(model.device), patches)
        frames = group[0].codes.shape[0]
        parts.append(losses[:, :-1].reshape(len(group), frames, -1).mean(dim=2).double().cpu() / math.log(2))
    return torch.cat(parts)


def measure_bits(
    model: CausalModel,
    windows: list[Window],
    baselines: Baselines,
    *,
    batch: int = 8,
    precision: Precision = "auto",
) -> Bits:
    """Bits of the model and of both baselines on the same windows."""
    pairs = [baselines.bits(window.codes) for window in windows]
    return Bits(
        model=model_bits(model, windows, batch=batch, precision=precision),
        unigram=torch.stack([unigram.mean(dim=(1, 2)) for unigram, _ in pairs]),
        copy=torch.stack([copy.mean(dim=(1, 2)) for _, copy in pairs]),
    )


def spread_windows(
    config: SourceConfig, *, frames: int, most: int, pixels: bool = False, split: str | None = None
) -> list[Window]:
    """At most `most` windows of a source (of one split of it), spread evenly over a fixed enumeration of it."""
    source = Source(config, frames=frames, seed=0, number=0, pixels=pixels, split=split)
    count = source.draws_per_epoch
    return [source.in_order(place * count // min(most, count)) for place in range(min(most, count))]


def heldout_evaluation(config: TrainConfig) -> Callable[[CausalModel], dict[str, float]]:
    """A callable for the training loop: the mean over the run's held-out data by modality.

    Bits per visual token, or the error of normalised patches where the model predicts pixels.
    """
    groups = list(_by_modality(config))
    measure, unit = (model_errors, "patch_error") if config.model.targets == "pixels" else (model_bits, "bits")

    def evaluate(model: CausalModel) -> dict[str, float]:
        found = {}
        for modality, windows in groups:
            values = measure(model, windows, precision=config.precision)
            found[f"{modality}_{unit}"] = float(values.mean())
            if values.shape[1] > 1:
                found[f"{modality}_{unit}_later_frames"] = float(values[:, 1:].mean())
        return found

    return evaluate


def _by_modality(config: TrainConfig) -> Iterator[tuple[str, list[Window]]]:
    frames, most, pixels = config.data.frames, config.eval_sequences, config.model.inputs == "patches"
    for modality in dict.fromkeys(source.modality for source in config.data.heldout):
        alike = [source for source in config.data.heldout if source.modality == modality]
        yield (
            modality,
            [window for each in alike for window in spread_windows(each, frames=frames, most=most, pixels=pixels)],
        )
