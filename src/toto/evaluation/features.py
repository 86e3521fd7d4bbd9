"""The one contract that read-outs ask of a backbone: frames in, hidden states by layer out."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.media.transforms import square
from toto.model.architectures import described
from toto.model.causal import CausalModel
from toto.model.weights import load_card, load_model, weights_sha256
from toto.runtime.device import Precision, autocast, pick_device, use_bf16
from toto.runtime.errors import CheckpointError, ConfigError
from toto.tokens.passport import Passport
from toto.tokens.patches import patchify
from toto.tokens.sequence import Modality, pack
from toto.tokens.tokenizer import Tokenizer


class Backbone(ABC):
    """What every backbone answers: Toto, and any other that is compared with it.

    Attributes:
        name: as it was asked for; for messages and records.
        layers: those that `features` gives; 0 is the embedding's output, l what block l gives, before a final norm.
        frames: T of the clips it takes; an image is a clip of one frame.
        stride: of the frames of videos, where nothing else is asked for.
        frame_size: height and width of the frames it takes.
        precision: auto, bf16 or fp32, of the matrix products.
        modality: of the clips that come next.
    """

    name: str
    layers: tuple[int, ...]
    frames: int
    stride: int
    frame_size: int
    precision: Precision
    modality: Modality = "video"

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    @abstractmethod
    def weights_sha256(self) -> str:
        """SHA-256 of its weight file, or of what its weights are a function of."""

    @abstractmethod
    def width(self, layer: int) -> int:
        """D of a layer's features."""

    @abstractmethod
    def prepared_as(self) -> str:
        """What `prepare` does, in words that change when the pixels or the tokens would."""

    @abstractmethod
    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """Hidden states of prepared clips by layer, each `[B, tokens, D]`, fp32, of visual tokens alone.

        A clip's features don't depend on its neighbours in the batch.
        """

    @property
    def passport(self) -> dict[str, Any]:
        """Of the tokens it was trained on, as a mapping; empty where it takes none."""
        return {}

    def prepare(self, frames: UInt8[Tensor, "T H W 3"]) -> UInt8[Tensor, "T S S 3"]:
        """Decoded frames as `features` takes them: shortest side to S = `frame_size`, then the square in the centre."""
        return square(frames, self.frame_size)

    def identity(self) -> dict[str, str]:
        """All that its features depend on besides the clips: what a cache of them is keyed by."""
        precision = "bf16" if use_bf16(self.precision, self.device) else "fp32"
        return {
            "weights": self.weights_sha256,
            "preparation": self.prepared_as(),
            "precision": precision,
            "modality": self.modality,
        }

    def select(self, layers: Sequence[int]) -> None:
        """Give these layers alone from now on.

        Raises:
            ConfigError: it has no such layer, or none is asked for.
        """
        unknown = sorted(set(layers) - set(self.layers))
        if unknown or not layers:
            has = f"{self.layers[0]} to {self.layers[-1]}" if len(self.layers) > 1 else str(self.layers[0])
            raise ConfigError(f"layers {unknown} asked, it has {has}", where=self.name, fix="name others with --layers")
        self.layers = tuple(sorted(set(layers)))


class TotoBackbone(Backbone):
    """A trained decoder as a backbone; features are those of the visual tokens.

    Its tokenizer makes the codes that it sees; a model with patch inputs needs none.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None,
        *,
        name: str,
        weights_sha256: str,
        passport: dict[str, Any],
        frames: int,
        stride: int,
        frame_size: int,
        grid: tuple[int, int],
        modality: Modality = "video",
        precision: Precision = "auto",
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name, self._weights, self._passport = name, weights_sha256, passport
        self.frames, self.stride, self.frame_size, self.grid = frames, stride, frame_size, grid
        self.modality, self.precision = modality, precision
        self.layers = tuple(range(model.config.layers + 1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the checkpoint's weight file."""
        return self._weights

    @property
    def passport(self) -> dict[str, Any]:
        """Of the tokens it was trained on."""
        return self._passport

    def width(self, layer: int) -> int:
        """The residual stream's, of every layer."""
        return self.model.config.width

    def prepared_as(self) -> str:
        """The frame size, the passport and the architecture, which the weight file doesn't tell."""
        known = {"passport": self._passport, "architecture": described(self.model.config), "size": self.frame_size}
        return f"toto {sha256_of_plain(known)}"

    @torch.inference_mode()
    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """One pass of the frozen trunk over the clips' sequences."""
        patches = None
        if self.tokenizer is not None:
            found = self.tokenizer.encode(frames.flatten(0, 1).to(self.tokenizer.device))
            codes = found.reshape(*frames.shape[:2], *found.shape[1:])
        else:
            codes = torch.zeros((*frames.shape[:2], *self.grid), dtype=torch.int64)  # the model doesn't look at them
            patches = patchify(frames.to(self.model.device), *self.grid)
        sequences = pack(codes, self.modality).to(self.model.device)
        with autocast(self.precision, self.model.device):
            _, states, _ = self.model.trunk(sequences, patches=patches, layers=self.layers)
        return {layer: state[:, 1:-1].float() for layer, state in sorted(states.items())}


def open_backbone(
    checkpoint: str | Path, tokenizer: Tokenizer | None, *, device: str = "auto", precision: Precision = "auto"
) -> TotoBackbone:
    """Load a checkpoint as a backbone; a tokenizer that did not make its tokens is refused.

    A model with patch inputs reads pixels and leaves the tokenizer aside; `load_backbone` opens others, too.

    Raises:
        PassportError: the tokenizer is a stranger to the checkpoint.
        CheckpointError: no checkpoint, or one that takes codes and no tokenizer is given.
    """
    card = load_card(checkpoint)
    passport = Passport.from_dict(card.passport, where=str(checkpoint))
    model = load_model(checkpoint, device=pick_device(device))
    sees_codes = model.config.inputs == "tokens"
    if sees_codes and tokenizer is None:
        raise CheckpointError("takes codes of a tokenizer", where=checkpoint, fix="name it with --tokenizer")
    if sees_codes and tokenizer is not None:
        passport.require_tokenizer(tokenizer.passport, where="tokenizer", fix="give the one the model was trained with")
    if passport.frame_size is None or passport.grid is None:
        raise ConfigError("its passport names no frame size", where=checkpoint, fix="train it with `toto train`")
    return TotoBackbone(
        model,
        tokenizer if sees_codes else None,
        name=str(checkpoint),
        weights_sha256=weights_sha256(checkpoint),
        passport=card.passport,
        frames=card.sequence["frames"],
        stride=card.sequence["stride"],
        frame_size=passport.frame_size[0],
        grid=passport.grid,
        precision=precision,
    )


def sha256_of_plain(value: Any) -> str:
    """SHA-256 of what JSON holds, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
