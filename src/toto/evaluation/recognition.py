"""What a classifier says: of one file by all of its views, and of labelled files as a result record."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from toto.evaluation.classifier import Classifier, ClassifierCard, Loaded
from toto.evaluation.finetune_data import Eyes, Kept
from toto.evaluation.labelled import LabelledClips
from toto.evaluation.read_out import Denominators
from toto.evaluation.result import Metric, Result, bootstrap
from toto.evaluation.views import ViewConfig, Views, read_views
from toto.media.catalog import Item
from toto.media.ledger import LedgerRow, count_by_status
from toto.runtime.ahead import ahead
from toto.runtime.device import Precision, autocast
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.progress import Progress
from toto.runtime.provenance import as_plain
from toto.runtime.ranks import ALONE, Ranks
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import Tokenizer

TOP = 5
READ_AHEAD = 2  # items


@torch.inference_mode()
def probabilities(
    classifier: Classifier, kept: Kept, eyes: Eyes, *, batch: int, precision: Precision
) -> dict[int, Float[Tensor, "V classes"]]:
    """The softmax of each layer's head for some views, `batch` of them at a time; in fp32 on the CPU."""
    device = classifier.backbone.device
    parts: dict[int, list[Tensor]] = {layer: [] for layer in classifier.layers}
    for first in range(0, len(kept), batch):
        sequences, patches = eyes.inputs(kept[first : first + batch], device)
        with autocast(precision, device):
            logits = classifier(sequences, patches).logits
        for layer, values in logits.items():
            parts[layer].append(values.float().softmax(dim=1).cpu())
    return {layer: torch.cat(found) for layer, found in parts.items()}


class Predictor:
    """What a classifier sees in single files.

    Args:
        loaded: the classifier.
        tokenizer: the model's; aside where it reads patches.
        views: of a video.
        batch: views in one pass.
        precision: of matrix products.

    Raises:
        PassportError: the tokenizer is a stranger to the classifier.
    """

    def __init__(
        self, loaded: Loaded, tokenizer: Tokenizer | None, *, views: ViewConfig, batch: int, precision: Precision
    ):
        passport = Passport.from_dict(loaded.known.passport, where=str(loaded.folder))
        if passport.frame_size is None or passport.grid is None:
            raise ConfigError("its passport names no frame size", where=loaded.folder, fix="use a whole classifier")
        reads_codes = loaded.classifier.backbone.config.inputs == "tokens"
        if reads_codes and tokenizer is not None:
            fix = "give the one the classifier was made with"
            passport.require_tokenizer(tokenizer.passport, where="--tokenizer", fix=fix)
        self._eyes = Eyes(tokenizer if reads_codes else None, passport.grid, loaded.card.modality)
        self._loaded, self._views, self._size = loaded, views, passport.frame_size[0]
        self._batch, self._precision = batch, precision

    def __call__(self, item: Item) -> Float[Tensor, " classes"]:
        """The probability of each class, averaged over the item's views.

        Raises:
            MediaError: it can't be read, or is no medium of the kind the classifier was made for.
        """
        card, sequence = self._loaded.card, self._loaded.known.sequence
        if item.kind != card.modality:
            raise MediaError(f"is no {card.modality}, which the classifier was made for", where=item.id)
        views = read_views(item, self._views, frames=sequence["frames"], stride=sequence["stride"], size=self._size)
        kept = self._eyes.kept(views.frames)
        found = probabilities(self._loaded.classifier, kept, self._eyes, batch=self._batch, precision=self._precision)
        return found[card.speaker].mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a classifier says of labelled items.

    Attributes:
        probabilities: layer -> `[items, classes]`, averaged over views; of the items that could be read.
        labels: theirs.
        ids: theirs.
        ledger: a row for every input that was offered.
        repeated: how many videos were shorter than a clip, so that their last frame was repeated.
    """

    probabilities: dict[int, Float[Tensor, "items classes"]]
    labels: Tensor
    ids: tuple[str, ...]
    ledger: tuple[LedgerRow, ...]
    repeated: int

    def correct(self, layer: int, top: int = 1) -> npt.NDArray[np.float64]:
        """For every item whether its class is among the `top` most likely ones."""
        said = self.probabilities[layer].topk(min(top, self.probabilities[layer].shape[1]), dim=1).indices
        hits: npt.NDArray[np.float64] = (said == self.labels[:, None]).any(dim=1).double().numpy()
        return hits

    def accuracy(self, layer: int) -> float:
        """Top-1."""
        return float(self.correct(layer).mean())


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """What became of one item: its row, and where it could be read the mean probabilities of each layer."""

    number: int
    row: LedgerRow
    means: dict[int, Float[Tensor, " classes"]] | None = None
    repeated: int = 0


def score(
    classifier: Classifier,
    clips: LabelledClips,
    eyes: Eyes,
    *,
    views: ViewConfig,
    frames: int,
    stride: int,
    size: int,
    batch: int,
    precision: Precision,
    ranks: Ranks = ALONE,
) -> Scores:
    """Scores of labelled items, averaged over their views after the softmax; what can't be read is counted.

    Several processes score a part each; all have the same in the end.

    Raises:
        ConfigError: nothing could be read.
    """
    classifier.eval()
    scored: list[_Scored] = []
    waiting: list[tuple[_Scored, Tensor]] = []

    def flush() -> None:
        if waiting:
            kept = eyes.kept(torch.cat([frames for _, frames in waiting]))
            found = probabilities(classifier, kept, eyes, batch=batch, precision=precision)
            sizes = [len(frames) for _, frames in waiting]
            by_item = {layer: torch.split(values, sizes) for layer, values in found.items()}
            for place, (item, _) in enumerate(waiting):
                means = {layer: values[place].mean(dim=0) for layer, values in by_item.items()}
                scored.append(replace(item, means=means))
            waiting.clear()

    mine = range(ranks.rank, len(clips.items), ranks.world)

    def read() -> Iterator[tuple[int, Views | MediaError]]:
        for number in mine:
            try:
                yield number, read_views(clips.items[number], views, frames=frames, stride=stride, size=size)
            except MediaError as error:
                yield number, error

    with (
        Progress(f"testing on {clips.name}", total=len(mine), unit="items") as progress,
        contextlib.closing(ahead(read(), READ_AHEAD)) as reading,
    ):
        for number, found in reading:
            item = clips.items[number]
            progress.advance()
            if isinstance(found, MediaError):
                row = LedgerRow(id=item.id, kind=item.kind, status=found.status, reason=found.what)
                scored.append(_Scored(number=number, row=row))
                continue
            row = LedgerRow(id=item.id, kind=item.kind, status="ok", frames=frames)
            waiting.append((_Scored(number=number, row=row, repeated=found.repeated), found.frames))
            if sum(len(frames) for _, frames in waiting) >= batch:
                flush()
        flush()
    return _all_scores(sorted(itertools.chain(*ranks.gathered(scored)), key=lambda each: each.number), clips)


def _all_scores(scored: list[_Scored], clips: LabelledClips) -> Scores:
    """The scores of all items, in their order."""
    seen = [(each, each.means) for each in scored if each.means is not None]
    if not seen:
        first = scored[0].row.reason if scored else "empty"
        raise ConfigError(f"nothing could be read (the first: {first})", where=clips.name)
    return Scores(
        probabilities={layer: torch.stack([means[layer] for _, means in seen]) for layer in seen[0][1]},
        labels=torch.tensor([clips.labels[each.number] for each, _ in seen]),
        ids=tuple(each.row.id for each, _ in seen),
        ledger=(*(each.row for each in scored), *clips.refused),
        repeated=sum(each.repeated for each, _ in seen),
    )


def result_of(
    scores: Scores,
    card: ClassifierCard,
    *,
    test: str,
    protocol: dict[str, object],
    model_sha256: str,
    passport: dict[str, object],
    train: tuple[LedgerRow, ...] = (),
) -> Result:
    """The record: top-1 and top-5 of the layer that speaks, and all layers beside."""
    counts = count_by_status(scores.ledger)
    denominators = Denominators.of(counts, evaluated=len(scores.labels))
    failed, layer = denominators.failed, card.speaker
    sizes = np.bincount(scores.labels.numpy(), minlength=len(card.classes))
    return Result(
        task="finetune",
        protocol={
            "test": test,
            "classes": list(card.classes),
            "mode": card.mode,
            "views": as_plain(card.views),
            "layer": layer,
            **protocol,
        },
        metrics={
            "top1": bootstrap(scores.correct(layer), failed=failed),
            "top5": bootstrap(scores.correct(layer, TOP), failed=failed),
            "chance": Metric(value=1 / len(card.classes)),
        },
        offered=denominators.offered,
        evaluated=denominators.evaluated,
        failed=failed,
        skipped=denominators.skipped,
        model_sha256=model_sha256,
        passport=passport,
        ledger={"test": counts} | ({"train": count_by_status(train)} if train else {}),
        details={
            "by_layer": [
                {
                    "layer": each,
                    "validation": card.validation.get(each),
                    **{name: as_plain(bootstrap(scores.correct(each, top), failed=failed)) for name, top in _TOPS},
                }
                for each in card.layers
            ],
            "largest_class": float(sizes.max() / sizes.sum()),
            "shorter_than_a_clip": scores.repeated,
            "failures": [as_plain(row) for row in (*train, *scores.ledger) if row.status != "ok"],
        },
    )


_TOPS = (("top1", 1), ("top5", TOP))
