"""The one contract that read-outs ask of a backbone: frames in, hidden states by layer out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.model.causal import CausalModel
from toto.model.weights import load_card, load_model
from toto.runtime.device import Precision, autocast, pick_device
from toto.runtime.errors import ConfigError
from toto.tokens.passport import Passport
from toto.tokens.patches import patchify
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
    """A trained decoder as a backbone; features are those of the visual tokens.

    Its tokenizer makes the codes that it sees; a model with patch inputs needs none.
    """

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer | None,
        *,
        frames: int,
        frame_size: int,
        grid: tuple[int, int],
        modality: Modality = "video",
        precision: Precision = "auto",
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.frames, self.frame_size, self.grid = frames, frame_size, grid
        self.modality, self.precision = modality, precision

    @property
    def layers(self) -> Sequence[int]:
        """0 to the number of blocks."""
        return range(self.model.config.layers + 1)

    @torch.inference_mode()
    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """One pass of the frozen trunk over the clips' sequences."""
        patches = None
        if self.tokenizer is not None:
            codes = torch.stack([self.tokenizer.encode(clip) for clip in frames])
        else:
            codes = torch.zeros((*frames.shape[:2], *self.grid), dtype=torch.int64)  # the model doesn't look at them
            patches = patchify(frames.to(self.model.device), *self.grid)
        sequences = pack(codes, self.modality).to(self.model.device)
        with autocast(self.precision, self.model.device):
            _, states, _ = self.model.trunk(sequences, patches=patches, layers=self.layers)
        return {layer: state[:, 1:-1].float() for layer, state in states.items()}


def open_backbone(
    checkpoint: str | Path, tokenizer: Tokenizer, *, device: str = "auto", precision: Precision = "auto"
) -> TotoBackbone:
    """Load a checkpoint as a backbone; a tokenizer that did not make its tokens is refused.

    A model with patch inputs reads pixels and leaves the tokenizer aside.

    Raises:
        PassportError: the tokenizer is a stranger to the checkpoint.
    """
    card = load_card(checkpoint)
    passport = Passport.from_dict(card.passport, where=str(checkpoint))
    model = load_model(checkpoint, device=pick_device(device))
    sees_codes = model.config.inputs == "tokens"
    if sees_codes:
        passport.require_tokenizer(tokenizer.passport, where="tokenizer", fix="give the one the model was trained with")
    if passport.frame_size is None or passport.grid is None:
        raise ConfigError("its passport names no frame size", where=checkpoint, fix="train it with `toto train`")
    return TotoBackbone(
        model,
        tokenizer if sees_codes else None,
        frames=card.sequence["frames"],
        frame_size=passport.frame_size[0],
        grid=passport.grid,
        precision=precision,
    )
