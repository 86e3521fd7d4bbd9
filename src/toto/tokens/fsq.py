"""Finite scalar quantisation: a tokenizer without a codebook, and the example of a kind of one's own.

Each of a cell's D values is squashed and rounded to one of a few levels; a code is the number that these digits
spell. Nothing can collapse, because nothing is learnt at the waist. (Mentzer et al., 2023, arXiv 2309.15505,
section 3; equation and bound as in its appendix.) Encoder and decoder are those of the small VQ-VAE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.tokens.neural import SIGNED, Network, NeuralTokenizer, to_frames, to_pixels
from toto.tokens.vqvae import DOWNSAMPLING, StackConfig, decoder, encoder


@dataclass(frozen=True, kw_only=True)
class FSQConfig:
    """Architecture of an FSQ autoencoder.

    Attributes:
        levels: how many values each digit of a code may take, at least 2; (7, 5, 5, 5, 5) gives 4,375 codes.
        encoder: widths of the encoder.
        decoder: widths of the decoder.
    """

    levels: tuple[int, ...]
    encoder: StackConfig
    decoder: StackConfig

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ConfigError(f"every digit needs at least 2 levels, not {self.levels}", where="FSQ levels")

    @property
    def vocab_size(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def downsampling(self) -> int:
        """Side of a code's cell in pixels."""
        return DOWNSAMPLING


@final
class FSQ(Network):
    """Pixels in [-1, 1] to digits and back."""

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.config: FSQConfig = config
        self.encoder = encoder(config.encoder, len(config.levels))
        self.decoder = decoder(config.decoder, len(config.levels))

    def digits(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B rows cols D"]:
        """Whole numbers centred on 0, with gradients that pass straight through the rounding."""
        values = self.encoder(pixels).permute(0, 2, 3, 1).float()
        levels = torch.tensor(self.config.levels, device=values.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        squashed = torch.tanh(values + torch.atanh(offset / half)) * half - offset
        return squashed + (squashed.round() - squashed).detach()

    def codes(self, digits: Float[Tensor, "B rows cols D"]) -> Int64[Tensor, "B rows cols"]:
        """The number that the digits spell, the first one counting units."""
        levels = torch.tensor(self.config.levels, device=digits.device)
        places = torch.cumprod(torch.cat([levels.new_ones(1), levels[:-1]]), 0)
        return ((digits.detach().round().long() + levels // 2) * places).sum(-1)

    def pixels(self, digits: Float[Tensor, "B rows cols D"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, meant to lie in [-1, 1], for the digits of each cell."""
        levels = torch.tensor(self.config.levels, device=digits.device)
        out: Tensor = self.decoder((digits / (levels // 2)).permute(0, 3, 1, 2))
        return out

    def relaxed(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int64[Tensor, "B rows cols"]]:
        """What training needs: rebuilt pixels that carry gradients, and the codes they went through."""
        digits = self.digits(pixels)
        return self.pixels(digits), self.codes(digits)

    def encode(self, frames: UInt8[Tensor, "B H W 3"]) -> Int64[Tensor, "B rows cols"]:
        """The code of every cell."""
        return self.codes(self.digits(to_pixels(frames)))

    def decode(self, codes: Int64[Tensor, "B rows cols"]) -> UInt8[Tensor, "B H W 3"]:
        """Frames that the codes stand for."""
        levels = torch.tensor(self.config.levels, device=codes.device)
        places = torch.cumprod(torch.cat([levels.new_ones(1), levels[:-1]]), 0)
        digits = codes.unsqueeze(-1) // places % levels - levels // 2
        return to_frames(self.pixels(digits.float()))


@final
class FSQTokenizer(NeuralTokenizer):
    """An FSQ autoencoder that is ready to use."""

    kind = "fsq"
    preprocessing = SIGNED
    network = FSQ
    architecture = FSQConfig
