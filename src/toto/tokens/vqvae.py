"""The small VQ-VAE: a convolutional autoencoder whose narrow waist is one of `vocab_size` unit vectors a cell.

The paper's family (DALL-E's dVAE) at laptop size: f8, so 128 px become 16 x 16 codes and 64 px 8 x 8. Nearly all
work happens at 1/4 and 1/8 of the frame's sides:

    frame -> space-to-depth 4 -> blocks at 1/4 -> stride 2 -> blocks at 1/8 -> unit vectors -> nearest code
    codes -> their vectors -> blocks at 1/8 -> depth-to-space 2 -> blocks at 1/4 -> depth-to-space 4 -> frame

No layer looks at other frames or at statistics of the batch. A code is the nearest vector of the codebook by angle.
Training is in `toto.training.tokenizer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from toto.tokens.neural import SIGNED, Network, NeuralTokenizer, to_frames, to_pixels

STEM: Final = 4  # sides of the pixel squares that become channels at either end
DOWNSAMPLING: Final = 2 * STEM


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Widths of an encoder or decoder.

    Attributes:
        widths: channels at 1/4 and at 1/8 of the frame's sides.
        hidden: channels inside the residual blocks there.
        blocks: how many residual blocks there are.
    """

    widths: tuple[int, int]
    hidden: tuple[int, int]
    blocks: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Architecture of a small VQ-VAE.

    Attributes:
        vocab_size: how many codes there are.
        code_width: length of a code's vector.
        encoder: widths of the encoder.
        decoder: widths of the decoder.
    """

    vocab_size: int
    code_width: int
    encoder: StackConfig
    decoder: StackConfig

    @property
    def downsampling(self) -> int:
        """Side of a code's cell in pixels."""
        return DOWNSAMPLING


@final
class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), without normalisation; `gain` scales the branch where training starts."""

    def __init__(self, width: int, hidden: int, gain: float):
        super().__init__()
        self.narrow = conv(width, hidden, 3, gain=2**0.5)
        self.widen = conv(hidden, width, 3, gain=gain)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        out: Tensor = x + self.widen(F.relu(self.narrow(F.relu(x))))
        return out


@final
class VQVAE(Network):
    """Pixels in [-1, 1] to unit vectors, vectors to the nearest codes, and codes back to pixels.

    `codebook` (`[V, code_width]`, unit vectors) is a buffer: it follows the encoder by moving averages, not gradients.
    """

    codebook: Tensor

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config.encoder, config.code_width)
        self.decoder = decoder(config.decoder, config.code_width)
        self.register_buffer("codebook", torch.zeros(config.vocab_size, config.code_width))

    def latents(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B rows cols D"]:
        """A unit vector for each cell, in float32."""
        return F.normalize(self.encoder(pixels).permute(0, 2, 3, 1).float(), dim=-1)

    def nearest(self, latents: Float[Tensor, "B rows cols D"]) -> Int64[Tensor, "B rows cols"]:
        """The code whose vector is nearest to each unit vector."""
        with torch.autocast(latents.device.type, enabled=False):
            book = self.codebook.float()
            nearness = latents.float() @ book.T - book.square().sum(1) / 2
        return nearness.argmax(-1)

    def pixels(self, vectors: Float[Tensor, "B rows cols D"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, meant to lie in [-1, 1], for a code vector in each cell."""
        scaled = vectors * self.config.code_width**0.5
        out: Tensor = self.decoder(scaled.permute(0, 3, 1, 2))
        return out

    def encode(self, frames: UInt8[Tensor, "B H W 3"]) -> Int64[Tensor, "B rows cols"]:
        """The code of every cell."""
        return self.nearest(self.latents(to_pixels(frames)))

    def decode(self, codes: Int64[Tensor, "B rows cols"]) -> UInt8[Tensor, "B H W 3"]:
        """Frames that the codes stand for."""
        return to_frames(self.pixels(self.codebook[codes]))


def encoder(config: StackConfig, code_width: int) -> nn.Sequential:
    """Space-to-depth, blocks at 1/4, blocks at 1/8, one vector a cell."""
    (w4, w8), (h4, h8), (n4, n8) = config.widths, config.hidden, config.blocks
    gain = 1 / (n4 + n8)
    return nn.Sequential(
        nn.PixelUnshuffle(STEM),
        conv(3 * STEM**2, w4, 3),
        *(ResidualBlock(w4, h4, gain) for _ in range(n4)),
        conv(w4, w8, 3, stride=2),
        *(ResidualBlock(w8, h8, gain) for _ in range(n8)),
        nn.ReLU(),
        conv(w8, code_width, 1),
    )


def decoder(config: StackConfig, code_width: int) -> nn.Sequential:
    """Blocks at 1/8, blocks at 1/4, depth-to-space."""
    (w4, w8), (h4, h8), (n4, n8) = config.widths, config.hidden, config.blocks
    gain = 1 / (n4 + n8)
    return nn.Sequential(
        conv(code_width, w8, 3),
        *(ResidualBlock(w8, h8, gain) for _ in range(n8)),
        conv(w8, 4 * w4, 1),
        nn.PixelShuffle(2),
        *(ResidualBlock(w4, h4, gain) for _ in range(n4)),
        nn.ReLU(),
        conv(w4, 3 * STEM**2, 3, gain=0.3),
        nn.PixelShuffle(STEM),
    )


def conv(width_in: int, width_out: int, kernel: int, *, gain: float = 1.0, stride: int = 1) -> nn.Conv2d:
    """A convolution drawn from N(0, gain / sqrt(fan in)), with zero bias, as in DALL-E's dVAE."""
    layer = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=gain / (width_in * kernel**2) ** 0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


@final
class VQVAETokenizer(NeuralTokenizer):
    """A small VQ-VAE that is ready to use; its weights are stored as float16 and computed in float32."""

    kind = "vqvae"
    preprocessing = SIGNED
    network = VQVAE
    architecture = VQVAEConfig
    stored_dtype = torch.float16
