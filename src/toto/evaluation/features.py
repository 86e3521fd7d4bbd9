"""The one contract that read-outs ask of a backbone: frames in, hidden states by layer out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.model.transformer import Transformer
from toto.model.weights import load_card, load_model
from toto.runtime.device import Precision, autocast, pick_device
from toto.runtime.errors import ConfigError
from toto.tokens.passport import Passport
from toto.tokens.sequence import Modality, pack
from toto.tokens.tokenizer import Tokenizer


@runtime_checkable
class Backbone(Protocol):
    """What every backbone answers: Toto, and any other that is compared with it."""

    @property
    def layers(self) -> Sequence[int]:
        """The layers it has features of; 0 is the embedding's output."""

    @property
    def frame_size(self) -> int:
        """Height and width of the frames it takes."""

    @property
    def frames(self) -> int:
        """T of the clips it takes."""

    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """Hidden states of clips by layer, each `[B, tokens, D]`, fp32."""


class TotoBackbone:
    """A trained decoder and its tokenizer as a backbone; features are those of the visual tokens."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        frames: int,
        frame_size: int,
        modality: Modality = "video",
        precision: Precision = "auto",
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.frames, self.frame_size, self.modality, self.precision = frames, frame_size, modality, precision

    @property
    def layers(self) -> Sequence[int]:
        """0 to the number of blocks."""
        return range(self.model.config.layers + 1)

    @torch.inference_mode()
    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """One pass of the frozen trunk over the clips' sequences."""
        codes = torch.stack([self.tokenizer.encode(clip) for clip in frames])
        sequences = pack(codes, self.modality).to(self.model.device)
        with autocast(self.precision, self.model.device):
            _, states, _ = self.model.trunk(sequences, layers=self.layers)
        return {layer: state[:, 1:-1].float() for layer, state in states.items()}


def open_backbone(
    checkpoint: str | Path, tokenizer: Tokenizer, *, device: str = "auto", precision: Precision = "auto"
) -> TotoBackbone:
    """Load a checkpoint as a backbone; a tokenizer that did not make its tokens is refused.

    Raises:
        PassportError: the tokenizer is a stranger to the checkpoint.
    """
    card = load_card(checkpoint)
    passport = Passport.from_dict(card.passport, where=str(checkpoint))
    passport.require_tokenizer(tokenizer.passport, where="tokenizer", fix="give the one the model was trained with")
    if passport.frame_size is None:
        raise ConfigError("its passport names no frame size", where=checkpoint, fix="train it with `toto train`")
    model = load_model(checkpoint, device=pick_device(device))
    return TotoBackbone(
        model,
        tokenizer,
        frames=card.sequence["frames"],
        frame_size=passport.frame_size[0],
        precision=precision,
    )
