"""VQGAN of taming-transformers, as published: f16 with 1,024 or 16,384 codes, and smaller ones of the same plan.

The architecture and the names of the parameters follow github.com/CompVis/taming-transformers
(taming/modules/diffusionmodules/model.py, taming/modules/vqvae/quantize.py); the quantiser's discriminator and
perceptual network belong to training and are not part of it. A code is the vector of the codebook with the smallest
squared distance to the encoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from toto.runtime.errors import CheckpointError, ConfigError
from toto.tokens.neural import SIGNED, Network, NeuralTokenizer, to_frames, to_pixels

NORM_GROUPS: Final = 32
IGNORED: Final = ("loss.", "model_ema.", "colorize")  # not the tokenizer's, in published checkpoints


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Architecture of a VQGAN; the defaults are the published f16 with 1,024 codes.

    Attributes:
        vocab_size: how many codes there are (n_embed).
        code_width: length of a code's vector (embed_dim).
        z_channels: channels of the encoder's output.
        resolution: side of the frames it was meant for; it only says where attention goes.
        ch: channels of the finest level.
        ch_mult: the same of every level, in units of `ch`; each level but the last halves the sides.
        num_res_blocks: residual blocks of an encoder's level; a decoder's has one more.
        attn_resolutions: sides at which the blocks of a level are followed by attention.
    """

    vocab_size: int = 1024
    code_width: int = 256
    z_channels: int = 256
    resolution: int = 256
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)

    def __post_init__(self) -> None:
        if not self.ch_mult or min(self.ch, self.vocab_size, self.code_width, self.z_channels, *self.ch_mult) < 1:
            raise ConfigError(f"widths of {self} aren't positive", where="VQGAN")
        if self.ch % NORM_GROUPS:
            raise ConfigError(f"{self.ch} channels can't be normalised in {NORM_GROUPS} groups", where="VQGAN ch")

    @property
    def downsampling(self) -> int:
        """Side of a code's cell in pixels."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def levels(self) -> list[tuple[int, bool]]:
        """Width of every level, the finest first, and whether attention follows its blocks."""
        sides = [self.resolution // 2**level for level in range(len(self.ch_mult))]
        return [
            (self.ch * times, side in self.attn_resolutions) for times, side in zip(self.ch_mult, sides, strict=True)
        ]


def normalisation(width: int) -> nn.GroupNorm:
    """Group normalisation as VQGAN has it everywhere."""
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)


@final
class ResnetBlock(nn.Module):
    """skip(x) + two times (normalise, swish, 3x3)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.norm1, self.norm2 = normalisation(width_in), normalisation(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Keep height and width."""
        branch = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        out: Tensor = branch + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


@final
class AttnBlock(nn.Module):
    """x + attention of every place to all places of its frame, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = normalisation(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT.unsqueeze(1) for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x.shape)
        out: Tensor = x + self.proj_out(seen)
        return out


@final
class Resample(nn.Module):
    """A 3x3 convolution that halves the sides, or that follows their doubling by nearest neighbours."""

    def __init__(self, width: int, *, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Height and width doubled or halved; halving pads at the right and at the bottom."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))
        return out


@final
class Middle(nn.Module):
    """Block, attention, block, at the coarsest level."""

    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


@final
class Level(nn.Module):
    """Blocks of one scale, each followed by attention where the level has it, and the way to the next scale."""

    def __init__(
        self, width_in: int, width: int, blocks: int, *, attention: bool, change: Literal["up", "down", "none"]
    ):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(width if place else width_in, width) for place in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(width) for _ in range(blocks if attention else 0))
        if change == "down":
            self.downsample = Resample(width, up=False)
        if change == "up":
            self.upsample = Resample(width, up=True)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Height and width stay, halve or double."""
        for place, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[place](x)
        if self.change == "down":
            x = self.downsample(x)
        if self.change == "up":
            x = self.upsample(x)
        return x


@final
class Encoder(nn.Module):
    """Pixels to `z_channels` values a cell."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, last = config.ch, len(config.levels) - 1
        for number, (wider, attention) in enumerate(config.levels):
            change: Literal["down", "none"] = "down" if number < last else "none"
            self.down.append(Level(width, wider, config.num_res_blocks, attention=attention, change=change))
            width = wider
        self.mid = Middle(width)
        self.norm_out = normalisation(width)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` to `[B, z_channels, rows, cols]`."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return out


@final
class Decoder(nn.Module):
    """`z_channels` values a cell to pixels; its levels are numbered as the encoder's, so it starts at the last."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        width = config.levels[-1][0]
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(width)
        levels: list[Level] = []
        for number, (narrower, attention) in reversed(list(enumerate(config.levels))):
            change: Literal["up", "none"] = "up" if number else "none"
            levels.append(Level(width, narrower, config.num_res_blocks + 1, attention=attention, change=change))
            width = narrower
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = normalisation(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, z_channels, rows, cols]` to `[B, 3, H, W]`."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


@final
class Quantizer(nn.Module):
    """The codebook under its published name."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_width)
        nn.init.uniform_(self.embedding.weight, -1 / config.vocab_size, 1 / config.vocab_size)


@final
class VQGAN(Network):
    """Pixels in [-1, 1] to vectors, vectors to the nearest codes, and codes back to pixels."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config: VQGANConfig = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.z_channels, 1)

    @property
    def codebook(self) -> Float[Tensor, "V D"]:
        """The codes' vectors: the parameter itself."""
        return self.quantize.embedding.weight

    def latents(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B rows cols D"]:
        """A vector for each cell, in float32."""
        vectors: Tensor = self.quant_conv(self.encoder(pixels))
        return vectors.permute(0, 2, 3, 1).float()

    @torch.no_grad()
    def nearest(self, latents: Float[Tensor, "B rows cols D"]) -> Int64[Tensor, "B rows cols"]:
        """The code whose vector is nearest to each vector; rounded as the published implementation rounds."""
        with torch.autocast(latents.device.type, enabled=False):
            flat, book = latents.flatten(0, 2), self.codebook.float()
            distance = flat.square().sum(1, keepdim=True) + book.square().sum(1) - 2 * flat @ book.T
        return distance.argmin(1).view(latents.shape[:3])

    def pixels(self, vectors: Float[Tensor, "B rows cols D"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, meant to lie in [-1, 1], for a code vector in each cell."""
        out: Tensor = self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))
        return out

    def encode(self, frames: UInt8[Tensor, "B H W 3"]) -> Int64[Tensor, "B rows cols"]:
        """The code of every cell."""
        return self.nearest(self.latents(to_pixels(frames)))

    def decode(self, codes: Int64[Tensor, "B rows cols"]) -> UInt8[Tensor, "B H W 3"]:
        """Frames that the codes stand for."""
        return to_frames(self.pixels(self.codebook[codes]))


def published_config(path: Path) -> VQGANConfig:
    """The architecture that a model's YAML of taming-transformers describes.

    Raises:
        CheckpointError: it can't be read, or describes something else than a VQModel.
    """
    fix = "give the configuration published with the checkpoint (model.yaml)"
    try:
        params = yaml.safe_load(path.read_text())["model"]["params"]
        plan = params["ddconfig"]
        found: dict[str, Any] = {
            "vocab_size": params["n_embed"],
            "code_width": params["embed_dim"],
            "z_channels": plan["z_channels"],
            "resolution": plan["resolution"],
            "ch": plan["ch"],
            "num_res_blocks": plan["num_res_blocks"],
        }
        sequences: dict[str, Any] = {name: tuple(plan[name]) for name in ("ch_mult", "attn_resolutions")}
        odd = {name: plan.get(name, usual) for name, usual in USUAL.items() if plan.get(name, usual) != usual}
        numbers = [*found.values(), *(value for values in sequences.values() for value in values)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(f"is no configuration of a VQGAN ({reason})", where=path, fix=fix) from None
    if wrong := [value for value in numbers if type(value) is not int]:
        raise CheckpointError(f"is no configuration of a VQGAN ({wrong[0]!r} is no whole number)", where=path, fix=fix)
    if odd:
        said = ", ".join(f"{name} {value}" for name, value in odd.items())
        raise CheckpointError(f"describes a variant that isn't supported ({said})", where=path, fix="use a VQModel")
    try:
        return VQGANConfig(**found, **sequences)
    except ConfigError as error:
        raise CheckpointError(error.what, where=path, fix=fix) from None


USUAL: Final = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}


def from_published(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tokenizer's parameters of a published checkpoint, and the names of those that belong to training."""
    ignored = [name for name in weights if name.startswith(IGNORED)]
    return {name: value for name, value in weights.items() if name not in set(ignored)}, ignored


@final
class VQGANTokenizer(NeuralTokenizer):
    """A VQGAN that is ready to use."""

    kind = "vqgan"
    preprocessing = SIGNED
    network = VQGAN
    architecture = VQGANConfig
