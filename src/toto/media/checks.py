"""What is wrong or odd with the items of a catalog: measured by decoding them, and read off their labels."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from toto.media.catalog import Catalog, Item, Row
from toto.media.clip import Clip
from toto.media.decode import codec_of
from toto.media.ledger import Status
from toto.media.reading import open_item, stream_item, stream_unit
from toto.media.transforms import square
from toto.runtime.errors import MediaError

LARGE_SIDE = 4096
ODD_ASPECT = 3.0
UNEVEN = 1.5
SHORT_NAME = 6
RARE = 0.1
EXAMPLES = 5
READ_BLOCK, READ_MOST, READ_LEAST = 2**20, 2**26, 2**18


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What decoding an item showed.

    Attributes:
        id: the item's.
        kind: image or video.
        status: ok, short or corrupt.
        reason: why, where not ok.
        codec: of the video, or the image's format.
        frames: kept at the stride.
        decoded: frames that the decoder had to give for that.
        height: in pixels, of the first frame.
        width: likewise.
        even: whether all frames are of one size and equally far apart in time.
        decode_seconds: time in the decoder.
        resize_seconds: time for resizing and cropping.
        sha256: of an item's bytes inside a container; empty for files.
    """

    id: str
    kind: str
    status: Status = "ok"
    reason: str = ""
    codec: str = "unknown"
    frames: int = 0
    decoded: int = 0
    height: int = 0
    width: int = 0
    even: bool = True
    decode_seconds: float = 0.0
    resize_seconds: float = 0.0
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to know about a source.

    Attributes:
        what: a word: missing, unreadable, ...
        count: how many items (or classes) it is about.
        of: among how many that was looked for.
        problem: whether it should be mended; else it is good to know.
        examples: the first few, with their reason.
        advice: what to do.
    """

    what: str
    count: int
    of: int
    problem: bool
    examples: tuple[str, ...]
    advice: str


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """How items are checked: as they would be tokenized."""

    size: int
    stride: int
    min_frames: int


class _Meter:
    """Collects what the clips of one item show."""

    def __init__(self, item: Item, config: CheckConfig):
        self.item, self.config = item, config
        self.sizes: set[tuple[int, int]] = set()
        self.times: list[float] = []
        self.frames = self.height = self.width = 0
        self.last = -1
        self.resize_seconds = 0.0

    def add(self, clip: Clip) -> None:
        """The next frames."""
        began = time.perf_counter()
        square(clip.frames, self.config.size)
        self.resize_seconds += time.perf_counter() - began
        height, width = clip.frames.shape[1:3]
        self.height, self.width = self.height or height, self.width or width
        self.sizes.add((height, width))
        self.times += clip.timestamps.tolist()
        self.frames += len(clip)
        self.last = int(clip.indices[-1])

    def result(self, decode_seconds: float, wrong: MediaError | None) -> Checked:
        """What all frames together say, or what was wrong."""
        short = f"{self.frames} frames at stride {self.config.stride}, fewer than {self.config.min_frames}"
        status: Status = wrong.status if wrong else "ok"
        reason = wrong.what if wrong else ""
        if not wrong and self.item.kind == "video" and self.frames < self.config.min_frames:
            status, reason = "short", short
        gaps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
        readable = status != "corrupt"
        return Checked(
            id=self.item.id,
            kind=self.item.kind,
            status=status,
            reason=reason,
            codec=_codec(self.item) if readable else "unknown",
            frames=self.frames,
            decoded=self.last + 1,
            height=self.height,
            width=self.width,
            even=len(self.sizes) < 2 and max(gaps, default=0.0) <= UNEVEN * usual + 1e-6,
            decode_seconds=decode_seconds,
            resize_seconds=self.resize_seconds,
            sha256=_sha256_inside(self.item) if readable else "",
        )


def check_unit(unit: tuple[Item, ...], config: CheckConfig) -> tuple[Checked, ...]:
    """Decode an item, or the windows of one video in one pass, and say what they are like."""
    meters = [_Meter(item, config) for item in unit]
    wrong: dict[int, MediaError] = {}
    if isinstance(unit[0].part, Row):
        with contextlib.suppress(MediaError):
            open_item(unit[0])  # a sample skips rows: what that takes is no time of decoding
    began = time.perf_counter()
    try:
        for place, clip in _clips(unit, config.stride):
            if isinstance(clip, MediaError):
                wrong.setdefault(place, clip)
                continue
            try:
                meters[place].add(clip)
            except MediaError as error:
                wrong.setdefault(place, error)
    except MediaError as error:
        wrong[0] = error
    spent = time.perf_counter() - began - sum(meter.resize_seconds for meter in meters)
    return tuple(meter.result(spent / len(unit), wrong.get(place)) for place, meter in enumerate(meters))


def find_problems(catalog: Catalog, checked: list[Checked], duplicates: dict[str, str], size: int) -> list[Finding]:
    """Everything worth saying, problems first."""
    every = len(catalog.items) + len(catalog.skipped)
    missing = [f"{row.id}: {row.reason}" for row in catalog.skipped if row.reason.startswith("missing")]
    broken = [f"{row.id}: {row.reason}" for row in catalog.skipped if _is_broken(row.status, row.reason)]
    twice = [f"{row.id}: {row.reason}" for row in catalog.skipped if row.status == "duplicate"]
    other = [f"{row.id}: {row.reason}" for row in catalog.skipped if row.status == "skipped"]
    missing += [f"{each.id}: {each.reason}" for each in checked if each.reason.startswith("missing")]
    broken += [f"{each.id}: {each.reason}" for each in checked if _is_broken(each.status, each.reason)]
    short = [f"{each.id}: {each.reason}" for each in checked if each.status == "short"]
    same = duplicates | duplicates_inside(checked)
    twice += [f"{id}: the same bytes as {original}" for id, original in same.items()]
    usable = [each for each in checked if each.status == "ok"]
    small = [f"{each.id}: {each.width} x {each.height}" for each in usable if min(each.height, each.width) < size]
    large = [f"{each.id}: {each.width} x {each.height}" for each in usable if max(each.height, each.width) > LARGE_SIDE]
    odd = [f"{each.id}: {each.width} x {each.height}" for each in usable if _aspect(each) > ODD_ASPECT]
    uneven = [each.id for each in usable if not each.even]
    labels = Counter(item.label for item in catalog.items if item.label is not None)
    alike = [f"{rare!r} ({labels[rare]}) and {other!r} ({labels[other]})" for rare, other in similar_labels(labels)]
    lonely = [label for label, count in sorted(labels.items()) if count == 1] if len(labels) > 1 else []
    read = len(checked)
    found = [
        ("missing", missing, every, True, "restore the files, or name their folder with --clips"),
        ("unreadable", broken, read, True, "restore or remove them: tokenizing counts them as corrupt"),
        ("short", short, read, True, "a smaller --stride or --min-frames keeps them"),
        ("duplicate", twice, every, True, "tokenizing keeps the first of files with the same bytes"),
        ("label spelled in two ways", alike, len(labels), True, "name both classes alike, if they are one"),
        ("class of one item", lonely, len(labels), False, "nothing is left to test on"),
        ("not media", other, every, False, "they are left out"),
        ("smaller than --size", small, read, False, "they are enlarged"),
        ("very large", large, read, False, "they decode slowly: scale them down once"),
        ("long and narrow", odd, read, False, "the square crop keeps less than a third of them"),
        ("uneven", uneven, read, False, "their frame rate or size varies: strides count frames, not time"),
    ]
    return [
        Finding(what=what, count=len(all_), of=of, problem=bad, examples=tuple(all_[:EXAMPLES]), advice=advice)
        for what, all_, of, bad, advice in found
        if all_
    ]


def similar_labels(counts: Counter[str]) -> list[tuple[str, str]]:
    """Pairs of labels that may be one class: equal but for case and separators, or a slip of the pen apart.

    A slip is one letter that is missing, added or another one, in a name of some length that is ten times rarer.

    >>> similar_labels(Counter({"eating cake": 40, "Eating_cake": 40, "yawning": 30, "yawnin": 1, "a1": 1, "a2": 50}))
    [('Eating_cake', 'eating cake'), ('yawnin', 'yawning')]
    """
    folded: dict[str, list[str]] = defaultdict(list)
    for label in sorted(counts):
        folded["".join(letter for letter in label.casefold() if letter.isalnum()) or label].append(label)
    pairs = [(other, names[-1]) for names in folded.values() for other in names[:-1]]
    near: dict[str, list[str]] = defaultdict(list)
    for name in folded:
        if len(name) >= SHORT_NAME and not any(letter.isdigit() for letter in name):
            for form in {name} | {name[:place] + name[place + 1 :] for place in range(len(name))}:
                near[form].append(name)
    seen = set()
    for names in near.values():
        for first, second in combinations(names, 2):
            rare, usual = sorted((folded[first][0], folded[second][0]), key=lambda name: (counts[name], name))
            if counts[rare] <= RARE * counts[usual] and (rare, usual) not in seen:
                seen.add((rare, usual))
                pairs.append((rare, usual))
    return sorted(pairs)


def duplicates_inside(checked: Iterable[Checked]) -> dict[str, str]:
    """Items of containers whose bytes are those of one before them: id -> id of the first."""
    first: dict[str, str] = {}
    found = {}
    for each in checked:
        if each.sha256 and (original := first.setdefault(each.sha256, each.id)) != each.id:
            found[each.id] = original
    return found


def read_speed(paths: Iterable[Path]) -> float | None:
    """Megabytes a second that the disk gives, past the cache where the system allows; None where there is too little.

    At most 64 MB are read.
    """
    read, seconds = 0, 0.0
    for path in dict.fromkeys(paths):
        if read >= READ_MOST:
            break
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while read < READ_MOST and (block := file.read(READ_BLOCK)):
                read += len(block)
            seconds += time.perf_counter() - began
    return read / 1e6 / max(seconds, 1e-9) if read >= READ_LEAST else None


def _clips(unit: tuple[Item, ...], stride: int) -> Iterator[tuple[int, Clip | MediaError]]:
    if len(unit) > 1:
        yield from stream_unit(unit, stride=stride, offsets=[0] * len(unit))
    else:
        yield from ((0, clip) for clip in stream_item(unit[0], stride=stride))


def _codec(item: Item) -> str:
    place = open_item(item)
    with contextlib.nullcontext() if isinstance(place, Path) else place:
        return codec_of(place, item.kind, source=item.id)


def _sha256_inside(item: Item) -> str:
    """The SHA-256 of an item that lies inside a container."""
    place = open_item(item)
    if isinstance(place, Path):
        return ""
    with place:
        return hashlib.file_digest(place, "sha256").hexdigest()


def _aspect(each: Checked) -> float:
    return max(each.height, each.width) / max(1, min(each.height, each.width))


def _is_broken(status: Status, reason: str) -> bool:
    return status == "corrupt" and not reason.startswith("missing")
