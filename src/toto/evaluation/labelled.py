"""Clips with labels: from a folder of classes, or made by the procedural corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from toto.evaluation.features import Backbone
from toto.evaluation.probe import Features
from toto.media.catalog import Item, list_source
from toto.media.clip import Clip
from toto.media.decode import read_clip, read_image
from toto.media.ledger import LedgerRow
from toto.media.procedural import BARS, MOTIONS, make_clip
from toto.media.transforms import square
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.progress import Progress
from toto.runtime.seed import stream
from toto.tokens.sequence import Modality

Reader = Callable[[int], Clip]
ProceduralLabel = Literal["motion", "bar"]


@dataclass(frozen=True, kw_only=True)
class LabelledClips:
    """Clips that can be read one by one, and what they show.

    Attributes:
        name: where they come from, for messages and records.
        modality: video, or image (clips of one frame).
        classes: the classes' names; a label is an index into them.
        labels: the label of every clip.
        ids: the id of every clip.
        read: reads clip number i, or raises MediaError.
    """

    name: str
    modality: Modality
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    ids: tuple[str, ...]
    read: Reader = field(repr=False)

    def subset(self, numbers: list[int]) -> LabelledClips:
        """Some of the clips, in the given order."""
        read = self.read
        return replace(
            self,
            labels=tuple(self.labels[number] for number in numbers),
            ids=tuple(self.ids[number] for number in numbers),
            read=lambda place: read(numbers[place]),
        )


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Features of the clips that could be read, and a ledger row for each that could not."""

    features: Features
    failed: tuple[LedgerRow, ...]


def procedural_clips(
    seed: int, count: int, *, frames: int, size: int, label: ProceduralLabel = "motion"
) -> LabelledClips:
    """The first `count` clips of a procedural corpus, labelled by the motion or by the bar in front of the shape."""
    if label == "motion":
        labels = tuple(number % len(MOTIONS) for number in range(count))
    else:
        labels = tuple(make_clip(seed, number, frames=1, size=16).bar for number in range(count))
    return LabelledClips(
        name=f"procedural {label}, seed {seed}",
        modality="video",
        classes=MOTIONS if label == "motion" else BARS,
        labels=labels,
        ids=tuple(f"procedural/{seed}/{number}" for number in range(count)),
        read=lambda number: make_clip(seed, number, frames=frames, size=size).clip,
    )


def folder_clips(folder: Path, *, frames: int, stride: int, classes: tuple[str, ...] | None = None) -> LabelledClips:
    """A folder of class folders with videos, or with images.

    Args:
        folder: the first folder below it is the class.
        frames: T of a video clip; its frames are 0, stride, 2 x stride, ...
        stride: of the frames.
        classes: the class order, of the training clips; None takes the names in alphabetical order.

    Raises:
        ConfigError: an item outside any class folder, images and videos mixed, or a class that is not in `classes`.
    """
    items = list_source(folder).items
    loose = [item.id for item in items if item.label is None]
    if loose:
        raise ConfigError(
            f"{len(loose)} items lie in no class folder ({loose[0]})", where=folder, fix="sort them by class"
        )
    kinds = {item.kind for item in items}
    if len(kinds) > 1:
        raise ConfigError("holds images and videos", where=folder, fix="probe them one after the other")
    names = classes or tuple(sorted({str(item.label) for item in items}))
    unknown = sorted({str(item.label) for item in items} - set(names))
    if unknown:
        raise ConfigError(f"classes {', '.join(unknown)} are not among the training classes", where=folder)
    return LabelledClips(
        name=str(folder),
        modality="image" if kinds == {"image"} else "video",
        classes=names,
        labels=tuple(names.index(str(item.label)) for item in items),
        ids=tuple(item.id for item in items),
        read=_reader(items, frames, stride),
    )


def _reader(items: tuple[Item, ...], frames: int, stride: int) -> Reader:
    def read(number: int) -> Clip:
        item = items[number]
        if item.kind == "image":
            return read_image(item.path, source=item.id)
        return read_clip(item.path, frames=frames, stride=stride, source=item.id)

    return read


def split_by_share(clips: LabelledClips, share: float, *, seed: int) -> tuple[LabelledClips, LabelledClips]:
    """Hold back a share of every class for testing, at least one clip; returns (training, test)."""
    if not 0 < share < 1:
        raise ConfigError(f"must lie between 0 and 1, is {share}", where="--test-share")
    test: list[int] = []
    for label in range(len(clips.classes)):
        members = [number for number, other in enumerate(clips.labels) if other == label]
        order = stream(seed, "test split", label).permutation(len(members))
        test += [members[place] for place in order[: max(1, round(share * len(members)))]]
    train = sorted(set(range(len(clips.labels))) - set(test))
    return clips.subset(train), clips.subset(sorted(test))


def extract(backbone: Backbone, clips: LabelledClips, *, batch: int) -> Extracted:
    """Features of all clips in one pass of the backbone; clips that can't be read are counted, never replaced."""
    parts: dict[int, list[torch.Tensor]] = {}
    labels: list[int] = []
    failed: list[LedgerRow] = []
    waiting: list[torch.Tensor] = []

    def flush() -> None:
        for layer, states in backbone.features(torch.stack(waiting)).items():
            parts.setdefault(layer, []).append(states.to(torch.bfloat16).cpu())
        waiting.clear()

    with Progress(f"features of {clips.name}", total=len(clips.labels), unit="clips") as progress:
        for number, label in enumerate(clips.labels):
            try:
                waiting.append(square(clips.read(number).frames, backbone.frame_size))
                labels.append(label)
            except MediaError as error:
                row = LedgerRow(id=clips.ids[number], kind=clips.modality, status=error.status, reason=error.what)
                failed.append(row)
            if len(waiting) == batch:
                flush()
            progress.advance()
    if waiting:
        flush()
    if not labels:
        first = failed[0].reason if failed else "there are none"
        raise ConfigError(f"no clip could be read (the first: {first})", where=clips.name)
    features = Features(
        by_layer={layer: torch.cat(found) for layer, found in parts.items()}, labels=torch.tensor(labels)
    )
    return Extracted(features=features, failed=tuple(failed))
