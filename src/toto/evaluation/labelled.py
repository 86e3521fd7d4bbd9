"""Clips with labels: from any catalog whose items have them, or made by the procedural corpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from toto.evaluation.contents import contents_of, of_items, settled, stamp_of
from toto.evaluation.feature_cache import FeatureCache
from toto.evaluation.features import Backbone, sha256_of_plain
from toto.evaluation.probe import Features
from toto.media.catalog import Item
from toto.media.catalogs import open_source
from toto.media.clip import Clip
from toto.media.ledger import LedgerRow, count_by_status
from toto.media.procedural import BARS, MOTIONS, make_clip
from toto.media.reading import read_item
from toto.media.sampling import require_frames
from toto.runtime.errors import ConfigError, MediaError
from toto.runtime.machine import cpu_memory
from toto.runtime.places import AnyPath
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
        refused: what the source names beside the clips: missing, named twice, no media.
        items: what they are read from, for those who choose the frames themselves; none where clips are made by code.
        how: which frames are read, in words that change when the frames would.
    """

    name: str
    modality: Modality
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    ids: tuple[str, ...]
    read: Reader = field(repr=False)
    refused: tuple[LedgerRow, ...] = ()
    items: tuple[Item, ...] = ()
    how: str = ""

    def identity(self, files: str) -> dict[str, object]:
        """What the pixels of the clips depend on: their ids, how frames are chosen, and what their files hold.

        Args:
            files: a checksum of what they hold (see `toto.evaluation.contents`); empty where code makes the clips.
        """
        return {"ids": self.ids, "how": self.how, "files": files, "name": "" if self.items else self.name}

    def subset(self, numbers: list[int]) -> LabelledClips:
        """Some of the clips, in the given order."""
        read = self.read
        return replace(
            self,
            labels=tuple(self.labels[number] for number in numbers),
            ids=tuple(self.ids[number] for number in numbers),
            read=lambda place: read(numbers[place]),
            items=tuple(self.items[number] for number in numbers) if self.items else (),
        )

    def first_of_each(self, most: int) -> LabelledClips:
        """At most so many clips of each class, the first ones."""
        if most < 1:
            raise ConfigError(f"must be at least 1, is {most}", where="--limit")
        counts = dict.fromkeys(range(len(self.classes)), 0)
        kept = []
        for number, label in enumerate(self.labels):
            counts[label] += 1
            if counts[label] <= most:
                kept.append(number)
        return replace(self.subset(kept), name=f"{self.name}, at most {most} of each class")


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Features of the clips that could be read, and a ledger row for every input that was offered."""

    features: Features
    ledger: tuple[LedgerRow, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many inputs have each status."""
        return count_by_status(self.ledger)

    @property
    def unused(self) -> tuple[LedgerRow, ...]:
        """The rows that are not ok."""
        return tuple(row for row in self.ledger if row.status != "ok")


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
        how=f"{frames} frames of {size} pixels",
    )


def catalog_clips(
    source: str,
    *,
    frames: int,
    stride: int,
    clips: AnyPath | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> LabelledClips:
    """The labelled videos, or images, of any source that `toto tokenize` reads.

    Args:
        source: a folder of class folders, a manifest, a container, or KIND:PATH.
        frames: T of a video clip; its frames are 0, stride, 2 x stride, ...
        stride: of the frames.
        clips: the folder that holds what a manifest names.
        split: only items of this split.
        image_column: of parquet files, the column with the bytes.
        label_column: of parquet files and CSVs, the column with the labels.
        classes: the class order, of the training clips; None takes the source's own, of the classes that have a clip.

    Raises:
        ConfigError: an item without a label, images and videos mixed, or a class that is not in `classes`.
    """
    catalog = open_source(source, clips=clips, split=split, image_column=image_column, label_column=label_column)
    items = catalog.items
    loose = [item.id for item in items if item.label is None]
    if loose:
        fix = "sort them by class" if catalog.form == "imagefolder" else "give each a label"
        raise ConfigError(f"{len(loose)} items have no label ({loose[0]})", where=source, fix=fix)
    kinds = {item.kind for item in items}
    if len(kinds) > 1:
        raise ConfigError("holds images and videos", where=source, fix="probe them one after the other")
    found = {str(item.label) for item in items}
    order = catalog.classes or tuple(sorted(found))
    names = classes or tuple(name for name in order if name in found)
    unknown = sorted(found - set(names))
    if unknown:
        raise ConfigError(f"classes {', '.join(unknown)} are not among the training classes", where=source)
    chosen = {"split": split, "image column": image_column, "label column": label_column}
    return LabelledClips(
        name=", ".join([source, *(f"{what} {name}" for what, name in chosen.items() if name is not None)]),
        modality="image" if kinds == {"image"} else "video",
        classes=names,
        labels=tuple(names.index(str(item.label)) for item in items),
        ids=tuple(item.id for item in items),
        read=_reader(items, frames, stride),
        refused=catalog.skipped,
        items=items,
        how=f"{frames} frames, every {stride}",
    )


def _reader(items: tuple[Item, ...], frames: int, stride: int) -> Reader:
    def read(number: int) -> Clip:
        clip = read_item(items[number], stride=stride, limit=frames)
        if items[number].kind == "video" and len(clip) < frames:
            require_frames((len(clip) - 1) * stride + 1, frames, stride, where=clip.source)
        return clip

    return read


def split_by_share(clips: LabelledClips, share: float, *, seed: int) -> tuple[LabelledClips, LabelledClips]:
    """Hold back a share of every class for testing, at least one clip; returns (training, test).

    Inputs that became no clip have no class: the same share of them is the test's.
    """
    if not 0 < share < 1:
        raise ConfigError(f"must lie between 0 and 1, is {share}", where="--test-share")
    test: list[int] = []
    for label in range(len(clips.classes)):
        members = [number for number, other in enumerate(clips.labels) if other == label]
        order = stream(seed, "test split", label).permutation(len(members))
        test += [members[place] for place in order[: max(1, round(share * len(members)))]]
    train = sorted(set(range(len(clips.labels))) - set(test))
    order = stream(seed, "test split", "refused").permutation(len(clips.refused))
    held = set(order[: round(share * len(order))].tolist())
    refused: tuple[list[LedgerRow], list[LedgerRow]] = ([], [])
    for number, row in enumerate(clips.refused):
        refused[number in held].append(row)
    return (
        replace(clips.subset(train), refused=tuple(refused[0])),
        replace(clips.subset(sorted(test)), refused=tuple(refused[1])),
    )


@dataclass(frozen=True, kw_only=True)
class Block:
    """Features of neighbouring clips.

    Attributes:
        features: layer -> `[clips, tokens, D]`, fp32, of those that could be read; None where none could.
        labels: of these.
        rows: of all that were offered, in their order.
    """

    features: dict[int, torch.Tensor] | None
    labels: tuple[int, ...]
    rows: tuple[LedgerRow, ...]


def stream_features(backbone: Backbone, clips: LabelledClips, *, batch: int, start: int = 0) -> Iterator[Block]:
    """Features of the clips from number `start` on, up to `batch` of them at once; one pass, nothing is kept.

    Clips that can't be read are named in the rows, never replaced.

    Raises:
        ConfigError: the backbone gives numbers that are none.
    """
    rows: list[LedgerRow] = []
    labels: list[int] = []
    waiting: list[torch.Tensor] = []

    def block() -> Block:
        found = backbone.features(torch.stack(waiting)) if waiting else None
        for layer, states in (found or {}).items():
            if not bool(states.isfinite().all()):
                what = f"its features of layer {layer} hold NaN or infinity ({rows[0].id} to {rows[-1].id})"
                raise ConfigError(what, where=backbone.name, fix="try --precision fp32, or another checkpoint")
        made = Block(
            features=None if found is None else {layer: states.cpu() for layer, states in found.items()},
            labels=tuple(labels),
            rows=tuple(rows),
        )
        for each in (rows, labels, waiting):
            each.clear()
        return made

    if batch < 1:
        raise ConfigError(f"must be at least 1, is {batch}", where="--batch")
    with Progress(f"features of {clips.name}", total=len(clips.labels), unit="clips") as progress:
        progress.advance(start)
        for number in range(start, len(clips.labels)):
            try:
                waiting.append(backbone.prepare(clips.read(number).frames))
                labels.append(clips.labels[number])
                row = LedgerRow(id=clips.ids[number], kind=clips.modality, status="ok", frames=len(waiting[-1]))
            except MediaError as error:
                row = LedgerRow(id=clips.ids[number], kind=clips.modality, status=error.status, reason=error.what)
            rows.append(row)
            if len(waiting) == batch:
                yield block()
            progress.advance()
    if rows:
        yield block()


def extract(backbone: Backbone, clips: LabelledClips, *, batch: int, cache: FeatureCache | None = None) -> Extracted:
    """Features of all clips in one pass of the backbone; clips that can't be read are counted, never replaced.

    With a cache, what it holds is not computed again, and the features are mapped into memory; without one they are
    kept there, in bf16.

    Raises:
        ConfigError: no clip could be read.
        StorageError: the features don't fit into the cache.
    """
    by_layer, rows = _kept(backbone, clips, batch) if cache is None else _cached(backbone, clips, batch, cache)
    labels = [label for label, row in zip(clips.labels, rows, strict=True) if row.status == "ok"]
    if not labels:
        first = rows[0].reason if rows else "there are none"
        raise ConfigError(f"no clip could be read (the first: {first})", where=clips.name)
    return Extracted(features=Features(by_layer=by_layer, labels=torch.tensor(labels)), ledger=(*rows, *clips.refused))


def _kept(backbone: Backbone, clips: LabelledClips, batch: int) -> tuple[dict[int, torch.Tensor], list[LedgerRow]]:
    parts: dict[int, list[torch.Tensor]] = {}
    rows: list[LedgerRow] = []
    for block in stream_features(backbone, clips, batch=batch):
        rows += block.rows
        if block.features and not parts:
            _require_memory(block.features, clips)
        for layer, states in (block.features or {}).items():
            parts.setdefault(layer, []).append(states.to(torch.bfloat16))
    return {layer: torch.cat(found) for layer, found in parts.items()}, rows


def _require_memory(features: dict[int, torch.Tensor], clips: LabelledClips) -> None:
    """Refuse to keep in memory, twice while they are put together, what this machine has no room for."""
    needed = 2 * len(clips.labels) * sum(states[0].numel() for states in features.values()) * torch.bfloat16.itemsize
    if needed > cpu_memory():
        what = f"its features need {needed / 1e9:.3g} GB of memory, there are {cpu_memory() / 1e9:.3g} GB"
        raise ConfigError(what, where=clips.name, fix="keep them on disk with --cache, or name fewer --layers")


def _cached(
    backbone: Backbone, clips: LabelledClips, batch: int, cache: FeatureCache
) -> tuple[dict[int, torch.Tensor], list[LedgerRow]]:
    began, stamps = time.time_ns(), _stamps(clips)
    files = _files(clips, stamps, cache, now=began) if clips.items else ""
    part = cache.part(clips.identity(files), backbone.layers, len(clips.labels))
    if not part.whole:
        with part.filling():
            for block in stream_features(backbone, clips, batch=batch, start=part.next):
                part.add(block.features, block.rows)
            if _changed(clips, stamps, files):
                part.forget()
                raise _changing(clips)
            part.keep(whole=True)
    return part.read()


def _stamps(clips: LabelledClips) -> str:
    return sha256_of_plain(of_items(clips.items, stamp_of))


def _files(clips: LabelledClips, stamps: str, cache: FeatureCache, *, now: int) -> str:
    """A checksum of what the clips' files hold; they are read only where a stamp is not that of the last time."""
    found = cache.known(stamps)
    if found is None:
        found = _checksum(clips)
        if _changed(clips, stamps, found):
            raise _changing(clips)
        if settled(clips.items, now=now):
            cache.remember(stamps, found)
    return found


def _checksum(clips: LabelledClips) -> str:
    return sha256_of_plain(contents_of(clips.items, name=clips.name))


def _changed(clips: LabelledClips, stamps: str, files: str) -> bool:
    """Whether the clips' files hold something else by now; they are read where a stamp is another one."""
    return bool(clips.items) and _stamps(clips) != stamps and _checksum(clips) != files


def _changing(clips: LabelledClips) -> ConfigError:
    fix = "run the same command again when nobody writes them"
    return ConfigError("its files changed while they were read", where=clips.name, fix=fix)
