"""Frozen features on disk: computed once, continued after a kill, mapped into memory afterwards.

    FOLDER/cache.json                 whose features these are (the backbone's name and identity), how they are stored
    FOLDER/<data>-<layers>/           features of some clips, at some layers
        layer-NNN.bin                 [rows, tokens, D] of the clips that could be read, in their order
        ledger.jsonl                  a line for each clip that was offered, with what became of it
        progress.json                 how much of these files is good; written aside, after they were synced
        lock                          held by the process that is filling the folder
    known.json                        checksums of what files hold, by their stamps; with `auto`, beside the folders

A folder is of one backbone: another one, or the same with other weights, tokenizer, precision or modality, is refused
by name. Files grow by appending, so a full disk is an error in one line, and nothing is written beyond the bound.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from toto.evaluation.features import sha256_of_plain
from toto.media.ledger import LedgerRow
from toto.runtime.cache import cache as machine_cache
from toto.runtime.errors import ConfigError, StorageError, StoreError
from toto.runtime.files import read_json, write_json, writing

FORMAT, VERSION = "toto-features", 1
CACHE_FILE, PROGRESS_FILE, LEDGER_FILE, LOCK_FILE = "cache.json", "progress.json", "ledger.jsonl", "lock"
KNOWN_FILE = "known.json"
AUTO: Final = "auto"
Stored = Literal["bf16", "fp16", "fp32"]
DTYPES: Final[dict[Stored, torch.dtype]] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPARED: Final = 0.05  # of the disk is left free
KEPT_EVERY: Final = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where features are kept, and how.

    Attributes:
        folder: of one backbone; "auto" is a folder for it in the machine's cache (TOTO_CACHE).
        gigabytes: what may be kept in the folder (with "auto", of all backbones); more is refused, not computed.
        stored: bf16, fp16 or fp32.
        tokens: keep the means of so many runs of neighbouring tokens instead of all; must divide their number.
    """

    folder: Path | Literal["auto"] = AUTO
    gigabytes: float = 20.0
    stored: Stored = "bf16"
    tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.gigabytes > 0:
            raise ConfigError(f"must be above 0, is {self.gigabytes:g}", where="--cache-gb")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"must be at least 1, is {self.tokens}", where="--cache-tokens")


class FeatureCache:
    """The features of one backbone on disk.

    Args:
        config: where and how.
        name: of the backbone, for messages.
        identity: all that its features depend on.
        kept_every: seconds between two states that a killed process goes on from.

    Raises:
        StoreError: the folder holds features of another backbone, or something else.
    """

    def __init__(self, config: CacheConfig, *, name: str, identity: Mapping[str, str], kept_every: float = KEPT_EVERY):
        self.config, self.name, self.kept_every = config, name, kept_every
        how = {"identity": dict(identity), "stored": config.stored, "tokens": config.tokens}
        if config.folder == AUTO:
            self.root = machine_cache().folder / "features"
            self.folder = self.root / key_of(how)
        else:
            self.root = self.folder = Path(config.folder)
        self._claim({"format": FORMAT, "version": VERSION, "name": name, **how})

    def _claim(self, wanted: dict[str, Any]) -> None:
        path = self.folder / CACHE_FILE
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise StoreError("holds other things than features", where=self.folder, fix="name an empty folder")
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(path, wanted)
            return
        found = read_json(path, what="feature cache")
        if not isinstance(found, dict) or (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise StoreError(f"not a {FORMAT} of version {VERSION}", where=path, fix="name another folder")
        differing = [key for key in ("stored", "tokens") if found.get(key) != wanted[key]]
        ours, theirs = wanted["identity"], found.get("identity", {})
        differing += sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if differing:
            what = f"holds features of {found.get('name')} and not of {self.name} ({', '.join(differing)} differ)"
            raise StoreError(what, where=self.folder, fix="name another folder with --cache")

    def part(self, data: Mapping[str, Any], layers: Sequence[int], offered: int) -> Part:
        """The features of some clips at some layers: what is there already, or an empty place for them."""
        key = key_of(data)
        for path in sorted(self.folder.glob(f"{key}-*/{PROGRESS_FILE}")):
            found = Part(self, path.parent, layers, offered)
            if found.whole and set(layers) <= set(found.state.layers):
                return found
        return Part(self, self.folder / f"{key}-{key_of(list(layers))[:8]}", layers, offered)

    def known(self, stamps: str) -> str | None:
        """The checksum of what files with these stamps hold; None where nobody has read them."""
        found = self._known().get(stamps)
        return found if isinstance(found, str) else None

    def remember(self, stamps: str, files: str) -> None:
        """Keep the checksum of what files with these stamps hold."""
        write_json(self.root / KNOWN_FILE, self._known() | {stamps: files})

    def _known(self) -> dict[str, Any]:
        try:
            found = read_json(self.root / KNOWN_FILE, what="list of checksums")
        except StoreError:  # of none or a damaged one: the files are read again
            return {}
        return found if isinstance(found, dict) else {}

    def require_room(self, size: int, part: Path) -> None:
        """Refuse `size` bytes for a part where they don't fit.

        Raises:
            StorageError: beyond the bound, or beyond what the disk has.
        """
        files = (file for file in self.root.rglob("layer-*.bin") if file.parent != part)
        taken, limit = sum(file.stat().st_size for file in files), self.config.gigabytes * 1e9
        disk = shutil.disk_usage(self.folder)
        own = sum(file.stat().st_size for file in part.glob("layer-*.bin"))
        if taken + size > limit:
            held = f", {taken / 1e9:.3g} GB are taken" if taken else ""
            what = f"its features need {size / 1e9:.3g} GB of a cache of {self.config.gigabytes:g} GB{held}"
            fix = "raise --cache-gb, name fewer --layers, or keep fewer --cache-tokens"
            raise StorageError(what, where=self.folder, fix=f"delete what isn't needed, {fix}" if taken else fix)
        if size - own > disk.free - SPARED * disk.total:
            what = f"its features need {size / 1e9:.3g} GB, the disk has {disk.free / 1e9:.3g} GB left"
            raise StorageError(what, where=self.folder, fix="make room, name fewer --layers, or fewer --cache-tokens")


@dataclass(frozen=True, kw_only=True)
class _State:
    """How much of a part's files is good.

    Attributes:
        next: the clip that comes next.
        rows: clips that could be read so far.
        ledger: bytes of the ledger.
        shape: layer -> tokens and D.
        layers: those that are stored.
        whole: whether all clips are there.
    """

    next: int = 0
    rows: int = 0
    ledger: int = 0
    shape: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] = ()
    whole: bool = False


class Part:
    """Features of some clips, whole or growing."""

    def __init__(self, cache: FeatureCache, folder: Path, layers: Sequence[int], offered: int):
        self.cache, self.folder, self.layers, self.offered = cache, folder, tuple(layers), offered
        self.dtype = DTYPES[cache.config.stored]
        self.state = self._read_state()
        self._kept = time.monotonic()

    @property
    def whole(self) -> bool:
        """Whether every clip was offered, so that nothing has to be computed."""
        return self.state.whole

    @property
    def next(self) -> int:
        """The clip to go on with."""
        return self.state.next

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Hold the folder while it is filled; what a killed process left half done is cut off.

        Raises:
            StoreError: another process is filling it.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK_FILE).open("ab")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fix = "wait for it, or name another folder with --cache"
                raise StoreError("another process is filling it", where=self.folder, fix=fix) from None
            self.state = self._read_state()
            self._cut()
            yield

    def add(self, states: Mapping[int, Float[Tensor, "B tokens D"]] | None, rows: Sequence[LedgerRow]) -> None:
        """Append the features of the clips that could be read among the next ones.

        Args:
            states: layer -> features of those whose row is ok; None where there are none.
            rows: of the next clips, in their order.

        Raises:
            StorageError: the disk is full, or the bound would be passed.
            ConfigError: features beyond fp16, or tokens that don't divide.
        """
        shape, count = dict(self.state.shape), 0
        ledger = b"".join(json.dumps(dataclasses.asdict(row)).encode() + b"\n" for row in rows)
        if states is not None:
            kept = {layer: self._pooled(states[layer]) for layer in self.layers}
            count = len(next(iter(kept.values())))
            found = {layer: (each.shape[1], each.shape[2]) for layer, each in kept.items()}
            if not shape:
                self.cache.require_room(self.offered * self._bytes(found), self.folder)
                shape = found
            if shape != found:
                what = f"clips have {found} tokens and widths, those before them {shape}"
                raise ConfigError(what, where=self.cache.name, fix="give clips of one length")
        with writing(self.folder):
            if states is not None:
                for layer, each in kept.items():
                    with self._file(layer).open("ab") as file:
                        file.write(_as_bytes(each.to(self.dtype), where=self.cache.name))
            with (self.folder / LEDGER_FILE).open("ab") as file:
                file.write(ledger)
        self.state = dataclasses.replace(
            self.state,
            next=self.state.next + len(rows),
            rows=self.state.rows + count,
            ledger=self.state.ledger + len(ledger),
            shape=shape,
            layers=self.layers,
        )
        if time.monotonic() - self._kept >= self.cache.kept_every:
            self.keep()

    def keep(self, *, whole: bool = False) -> None:
        """Make what is there safe: a killed process goes on from here."""
        self.state = dataclasses.replace(self.state, whole=whole, layers=self.layers)
        with writing(self.folder):
            for path in (*(self._file(layer) for layer in self.state.shape), self.folder / LEDGER_FILE):
                if path.exists():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
        plain = dataclasses.asdict(self.state)
        plain["shape"] = {str(layer): list(each) for layer, each in self.state.shape.items()}
        write_json(self.folder / PROGRESS_FILE, plain)
        self._kept = time.monotonic()

    def forget(self) -> None:
        """Begin anew the next time: what is there is of other clips than it says."""
        with writing(self.folder):
            (self.folder / PROGRESS_FILE).unlink(missing_ok=True)
        self.state = _State()

    def read(self) -> tuple[dict[int, Tensor], list[LedgerRow]]:
        """Features by layer, `[rows, tokens, D]`, mapped into memory, and the ledger's rows.

        Raises:
            StoreError: files that are shorter than they were.
        """
        found = {layer: self._mapped(layer) for layer in self.layers if layer in self.state.shape}
        try:
            lines = (self.folder / LEDGER_FILE).read_bytes()[: self.state.ledger].splitlines()
            rows = [LedgerRow(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(f"ledger ({error})") from None
        if len(rows) != self.state.next:
            raise self._damaged("ledger")
        return found, rows

    def _mapped(self, layer: int) -> Tensor:
        tokens, width = self.state.shape[layer]
        shape = (self.state.rows, tokens, width)
        path = self._file(layer)
        if not path.exists() or path.stat().st_size < int(np.prod(shape)) * self.dtype.itemsize:
            raise self._damaged(path.name)
        kind = np.float32 if self.dtype == torch.float32 else np.int16
        mapped = torch.from_numpy(np.memmap(path, dtype=kind, mode="c", shape=shape))
        return mapped if kind is np.float32 else mapped.view(self.dtype)

    def _pooled(self, states: Tensor) -> Tensor:
        states, wanted = states.detach().cpu(), self.cache.config.tokens
        if wanted is None or wanted == states.shape[1]:
            return states
        if states.shape[1] % wanted:
            what = f"{wanted} doesn't divide the {states.shape[1]} tokens of {self.cache.name}"
            raise ConfigError(what, where="--cache-tokens", fix="choose a divisor")
        return states.reshape(len(states), wanted, -1, states.shape[2]).mean(dim=2)

    def _bytes(self, shape: Mapping[int, tuple[int, int]]) -> int:
        return sum(tokens * width for tokens, width in shape.values()) * self.dtype.itemsize

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03d}.bin"

    def _read_state(self) -> _State:
        path = self.folder / PROGRESS_FILE
        if not path.exists():
            return _State()
        plain = read_json(path, what="progress of a feature cache")
        try:
            shape = {int(layer): (int(tokens), int(width)) for layer, (tokens, width) in plain.pop("shape").items()}
            return _State(**{**plain, "layers": tuple(plain["layers"]), "shape": shape})
        except (TypeError, KeyError, ValueError, AttributeError):
            raise self._damaged(PROGRESS_FILE) from None

    def _cut(self) -> None:
        """Bring the files to the length that `progress.json` tells of; what came later was never finished."""
        sizes = {self.folder / LEDGER_FILE: self.state.ledger}
        for layer in self.layers:
            tokens, width = self.state.shape.get(layer, (0, 0))
            sizes[self._file(layer)] = self.state.rows * tokens * width * self.dtype.itemsize
        for path, size in sizes.items():
            if not path.exists() and not size:
                continue
            if not path.exists() or path.stat().st_size < size:
                raise self._damaged(path.name)
            os.truncate(path, size)

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"its {what} is damaged", where=self.folder, fix="delete the folder; it is made again")


def key_of(value: Any) -> str:
    """A name for what JSON holds."""
    return sha256_of_plain(value)[:24]


def _as_bytes(tensor: Tensor, *, where: str) -> bytes:
    if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
        raise ConfigError("has features beyond what fp16 holds", where=where, fix="keep them in bf16")
    plain = tensor.contiguous()
    return plain.numpy().tobytes() if plain.dtype == torch.float32 else plain.view(torch.int16).numpy().tobytes()
