"""The interface every discrete tokenizer answers, and how one is loaded by name or folder.

A tokenizer on disk is a folder: `tokenizer.json` (kind, architecture, passport) and `model.safetensors`.
A new kind is one file beside this one and one entry in `KINDS`. A kind that lives in another distribution is an entry
point of the group `toto.tokenizers`: its name is the kind, its value "package.module:TokenizerClass".
"""

from __future__ import annotations

import abc
import importlib
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from toto.runtime.errors import CheckpointError, MediaError
from toto.runtime.files import read_json
from toto.tokens.grid import check_codes
from toto.tokens.passport import Passport

CONFIG_FILE = "tokenizer.json"
WEIGHTS_FILE = "model.safetensors"
EMBEDDED = "embedded"
KINDS = {
    "dvae": "toto.tokens.dvae:DVAETokenizer",
    "fsq": "toto.tokens.fsq:FSQTokenizer",
    "vqgan": "toto.tokens.vqgan:VQGANTokenizer",
    "vqvae": "toto.tokens.vqvae:VQVAETokenizer",
}
ENTRY_POINTS = "toto.tokenizers"
Arithmetic = Literal["fp32", "bf16"]


class Tokenizer(abc.ABC):
    """Frames to codes and back.

    Frames are uint8 RGB `[T, H, W, 3]`; codes are int64 `[T, rows, cols]` in `0 .. vocab_size - 1`.
    """

    downsampling: int
    device: torch.device

    @property
    @abc.abstractmethod
    def passport(self) -> Passport:
        """The tokenizer's identity, without a frame size; `at` adds one."""

    @abc.abstractmethod
    def encode(self, frames: UInt8[Tensor, "T H W 3"]) -> Int64[Tensor, "T rows cols"]:
        """Codes of frames whose sides are multiples of `downsampling`; each frame by itself."""

    @abc.abstractmethod
    def decode(self, codes: Int64[Tensor, "T rows cols"]) -> UInt8[Tensor, "T H W 3"]:
        """Frames that the codes stand for."""

    @classmethod
    @abc.abstractmethod
    def from_folder(
        cls, folder: Path, config: dict[str, Any], device: torch.device, precision: Arithmetic = "fp32"
    ) -> Tokenizer:
        """Load from a tokenizer folder whose `tokenizer.json` has been read."""

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Write a tokenizer folder that `from_folder` reads."""

    @property
    def vocab_size(self) -> int:
        """How many different codes there are."""
        return self.passport.vocab_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the codes of a frame of this size in pixels."""
        step = self.downsampling
        if height % step or width % step or not height or not width:
            raise MediaError(
                f"frames of {height} x {width} don't fit a grid of {step} x {step} pixel cells",
                fix=f"use sides that are multiples of {step}",
            )
        return height // step, width // step

    def at(self, height: int, width: int) -> Passport:
        """The passport of tokens made from frames of this size."""
        plain = self.passport.to_dict()
        plain.update(frame_size=(height, width), grid=self.grid(height, width))
        return Passport(**plain)

    def require_codes(self, codes: Tensor) -> None:
        """Refuse codes that this tokenizer has not got."""
        check_codes(codes, self.vocab_size, where=f"{self.passport.kind} tokenizer")


def load_tokenizer(
    name: str | Path = EMBEDDED, *, device: str | torch.device = "cpu", precision: Arithmetic = "fp32"
) -> Tokenizer:
    """Load a tokenizer: the small one that ships with toto ("embedded"), or a folder.

    Args:
        name: "embedded" or the folder.
        device: where it computes.
        precision: of its matrix products. In bf16 a few codes in a hundred differ from those in fp32, so a store
            should be made in one of them; the store's job record says which.

    Raises:
        CheckpointError: the folder is not a tokenizer, or its weights don't fit.
    """
    folder = embedded_folder() if str(name) == EMBEDDED else Path(name)
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"no tokenizer here ({CONFIG_FILE} is missing)",
            where=folder,
            fix=f"give a tokenizer folder or {EMBEDDED!r}",
        )
    config = read_json(folder / CONFIG_FILE, what="tokenizer configuration")
    kind = config.get("kind") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError("names no kind of tokenizer", where=folder / CONFIG_FILE, fix="use a whole folder")
    return tokenizer_class(kind, where=folder).from_folder(folder, config, torch.device(device), precision)


def tokenizer_class(kind: str, *, where: str | Path) -> type[Tokenizer]:
    """The class of a kind of tokenizer: toto's own, or one that another distribution registered.

    Raises:
        CheckpointError: nobody knows the kind, or what is registered for it can't be imported or is no tokenizer.
    """
    others = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    known = others | KINDS
    if kind not in known:
        raise CheckpointError(
            f"unknown kind of tokenizer {kind!r}",
            where=where,
            fix=f"known kinds: {', '.join(sorted(known))}; others come with the package that made it",
        )
    module, _, name_in_module = known[kind].partition(":")
    try:
        found = getattr(importlib.import_module(module), name_in_module)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"the kind {kind!r} is registered as {known[kind]}, which can't be imported ({error})",
            where=where,
            fix="mend or remove the package that registers it",
        ) from None
    if not (isinstance(found, type) and issubclass(found, Tokenizer)):
        raise CheckpointError(
            f"the kind {kind!r} is registered as {known[kind]}, which is no Tokenizer",
            where=where,
            fix="mend or remove the package that registers it",
        )
    return found


def embedded_folder() -> Path:
    """Where the tokenizer that ships inside the package lies."""
    return Path(str(resources.files("toto.tokens"))) / "embedded"
