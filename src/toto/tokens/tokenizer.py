"""The interface every discrete tokenizer answers, and how one is loaded by name or folder.

A tokenizer on disk is a folder: `tokenizer.json` (kind, architecture, passport) and `model.safetensors`.
A new kind is one file beside this one and one entry in `KINDS`.
"""

from __future__ import annotations

import abc
import importlib
from importlib import resources
from pathlib import Path
from typing import Any

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
KINDS = {"vqvae": "toto.tokens.vqvae:VQVAETokenizer"}


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
    def from_folder(cls, folder: Path, config: dict[str, Any], device: torch.device) -> Tokenizer:
        """Load from a tokenizer folder whose `tokenizer.json` has been read."""

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


def load_tokenizer(name: str | Path = EMBEDDED, *, device: str | torch.device = "cpu") -> Tokenizer:
    """Load a tokenizer: the small one that ships with toto ("embedded"), or a folder.

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
    if kind not in KINDS:
        raise CheckpointError(
            f"unknown kind of tokenizer {kind!r}", where=folder, fix=f"known kinds: {', '.join(KINDS)}"
        )
    module, name_in_module = KINDS[kind].split(":")
    tokenizer_class: type[Tokenizer] = getattr(importlib.import_module(module), name_in_module)
    return tokenizer_class.from_folder(folder, config, torch.device(device))


def embedded_folder() -> Path:
    """Where the tokenizer that ships inside the package lies."""
    return Path(str(resources.files("toto.tokens"))) / "embedded"
