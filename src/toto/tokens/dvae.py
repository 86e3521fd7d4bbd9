"""DALL-E's dVAE, as published: the tokenizer of the paper's main models.

f8, 8,192 codes, 53.8 M parameters in the encoder and 44 M in the decoder at the published size. The architecture and
the names of the parameters follow github.com/openai/DALL-E (dall_e/encoder.py, decoder.py, utils.py); what is
`w` and `b` there is `weight` and `bias` here.

Pixels are squeezed into [0.1, 0.9] before the encoder. A token is the code with the largest logit. The decoder gives
six values a pixel, the location and log scale of a logit-Laplace distribution; a picture is the sigmoid of the
locations with the squeeze undone. The first and last convolution always compute in float32.

A tokenizer on a CPU encodes by `PreparedEncoder`, made of the loaded weights; training and other devices use `DVAE`'s
own modules.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from toto.runtime.errors import ConfigError
from toto.tokens.convolution import LargestLogit, Packed, Winograd, available
from toto.tokens.neural import Network, NeuralTokenizer
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import Arithmetic

GROUPS: Final = 4
SQUEEZE: Final = 0.1  # epsilon of the published map_pixels
FINE_TO_COARSE: Final = (1, 2, 4, 8)  # widths of the encoder's groups, in units of n_hid
WINOGRAD_PRODUCT: Final = 128 * 128  # of channels in and out
FINE_GROUPS: Final = 2  # these compute so many pixels at once, for their maps to stay in the caches
FINE_PIXELS: Final = 2**14
DOWNSAMPLING: Final = 2 ** (GROUPS - 1)


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Architecture of a dVAE; the published values are n_hid 256, n_init 128, 2 blocks and 8,192 codes.

    Attributes:
        vocab_size: how many codes there are.
        n_hid: channels of the finest group; the others have 2, 4 and 8 times as many.
        n_init: channels the decoder makes of a code.
        blocks: residual blocks in each of the four groups.
    """

    vocab_size: int = 8192
    n_hid: int = 256
    n_init: int = 128
    blocks: int = 2

    def __post_init__(self) -> None:
        if self.n_hid % 4 or min(self.vocab_size, self.n_hid, self.n_init, self.blocks) < 1:
            raise ConfigError(f"widths of {self} aren't positive, or n_hid isn't a multiple of 4", where="dVAE")

    @property
    def downsampling(self) -> int:
        """Side of a code's cell in pixels."""
        return DOWNSAMPLING


@final
class Conv(nn.Module):
    """A convolution with padding, drawn from N(0, 1 / sqrt(fan in)) with zero bias; computes in its weights' dtype."""

    def __init__(self, width_in: int, width_out: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_out, width_in, kernel, kernel) / (width_in * kernel**2) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(width_out))
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """Keep height and width."""
        return F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, padding=self.padding)


@final
class Block(nn.Module):
    """skip(x) + gain x branch(x), the branch being four times (ReLU, convolution); the stream keeps its dtype."""

    def __init__(self, width_in: int, width_out: int, kernels: tuple[int, int, int, int], gain: float):
        super().__init__()
        hidden = width_out // 4
        widths = (width_in, hidden, hidden, hidden, width_out)
        self.gain = gain
        self.id_path: nn.Module = Conv(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        self.res_path = nn.Sequential(
            OrderedDict(
                (f"conv_{place + 1}", Conv(widths[place], widths[place + 1], kernel))
                for place, kernel in enumerate(kernels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keep height and width."""
        branch = x
        for conv in self.res_path:
            branch = conv(F.relu(branch))
        return torch.add(self.id_path(x).to(x.dtype), branch.to(x.dtype), alpha=self.gain)


@final
class Stack(nn.Module):
    """One side of the dVAE: a first convolution, four groups of blocks with a change of scale between, a last one.

    Its modules have the published names: blocks.input, blocks.group_1.block_1..., blocks.output.conv.
    """

    def __init__(self, first: Conv, last: Conv, groups: list[nn.Sequential]):
        super().__init__()
        named = {f"group_{number}": group for number, group in enumerate(groups, start=1)}
        self.blocks = nn.ModuleDict({"input": first, **named, "output": nn.ModuleDict({"conv": last})})

    @property
    def first(self) -> Conv:
        """The first convolution."""
        found = self.blocks["input"]
        assert isinstance(found, Conv)
        return found

    @property
    def last(self) -> Conv:
        """The last convolution, before which comes a ReLU."""
        output = self.blocks["output"]
        assert isinstance(output, nn.ModuleDict)
        found = output["conv"]
        assert isinstance(found, Conv)
        return found

    @property
    def groups(self) -> list[nn.Module]:
        """The groups of blocks, in order."""
        return [module for name, module in self.blocks.items() if name.startswith("group")]


def groups(
    width: int, widths: tuple[int, ...], blocks: int, kernels: tuple[int, int, int, int], gain: float
) -> list[nn.Sequential]:
    """Groups of residual blocks with these widths, for a first input of `width` channels."""
    made = []
    for before, after in zip((width, *widths), widths, strict=False):
        named = [
            (f"block_{place + 1}", Block(after if place else before, after, kernels, gain)) for place in range(blocks)
        ]
        made.append(nn.Sequential(OrderedDict(named)))
    return made


@final
class DVAE(Network):
    """The encoder's logits, the decoder's six values a pixel, and what lies between for training."""

    def __init__(self, config: DVAEConfig):
        super().__init__()
        self.config: DVAEConfig = config
        self._prepared: PreparedEncoder | None = None
        fine = tuple(config.n_hid * times for times in FINE_TO_COARSE)
        gain = 1 / (GROUPS * config.blocks) ** 2
        self.encoder = Stack(
            Conv(3, fine[0], 7),
            Conv(fine[-1], config.vocab_size, 1),
            groups(fine[0], fine, config.blocks, (3, 3, 3, 1), gain),
        )
        self.decoder = Stack(
            Conv(config.vocab_size, config.n_init, 1),
            Conv(fine[0], 6, 1),
            groups(config.n_init, fine[::-1], config.blocks, (1, 3, 3, 3), gain),
        )

    def features(self, squeezed: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C rows cols"]:
        """What the last convolution makes logits of, from squeezed pixels; float32."""
        with torch.autocast(squeezed.device.type, enabled=False):
            x = self.encoder.first(squeezed.float())
        for number, group in enumerate(self.encoder.groups):
            x = group(F.max_pool2d(x, 2) if number else x)
        return F.relu(x).float()

    def logits(self, squeezed: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B V rows cols"]:
        """Logits of the codes from squeezed pixels."""
        features = self.features(squeezed)
        with torch.autocast(squeezed.device.type, enabled=False):
            out: Tensor = self.encoder.last(features)
        return out

    def values(self, codes: Float[Tensor, "B V rows cols"]) -> Float[Tensor, "B 6 H W"]:
        """Location and log scale of each pixel's logit from one-hot codes, or from weights that sum to one."""
        with torch.autocast(codes.device.type, enabled=False):
            x = self.decoder.first(codes.float())
        return self._values(x)

    def encode(self, frames: UInt8[Tensor, "B H W 3"]) -> Int64[Tensor, "B rows cols"]:
        """The code with the largest logit in every cell."""
        pixels = frames.permute(0, 3, 1, 2).float().mul_((1 - 2 * SQUEEZE) / 255).add_(SQUEEZE)
        if self._prepared is not None:
            return self._prepared(pixels)
        return self.logits(pixels).permute(0, 2, 3, 1).argmax(-1)

    def prepare(self, encoder: PreparedEncoder) -> None:
        """Encode with this from now on: the weights must stay as they are."""
        self._prepared = encoder

    def decode(self, codes: Int64[Tensor, "B rows cols"]) -> UInt8[Tensor, "B H W 3"]:
        """The most likely frames."""
        levels = self.picture(codes).mul_(255).round_().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous()

    def picture(self, codes: Int64[Tensor, "B rows cols"]) -> Float[Tensor, "B 3 H W"]:
        """The most likely pixels in [0, 1]."""
        first = self.decoder.first  # of a one-hot vector: a column of its weights
        x = F.embedding(codes, first.weight[:, :, 0, 0].T) + first.bias
        return unsqueezed(torch.sigmoid(self._values(x.permute(0, 3, 1, 2))[:, :3]))

    def _values(self, x: Tensor) -> Tensor:
        for number, group in enumerate(self.decoder.groups):
            x = group(F.interpolate(x, scale_factor=2.0) if number else x)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.decoder.last(F.relu(x).float())
        return out

    def lower(self) -> None:
        """Store the convolutions of the groups in bfloat16."""
        for group in (*self.encoder.groups, *self.decoder.groups):
            group.to(torch.bfloat16)


@final
class PreparedBlock:
    """A block for inference on a CPU: the stream is changed in place, the gain is in the last convolution's weights.

    Its sums are in the dtype of the stream, here the same as the convolutions'.
    """

    def __init__(self, block: Block, dtype: torch.dtype):
        *inner, last = (conv for conv in block.res_path if isinstance(conv, Conv))
        self.skip = Packed(block.id_path.weight, block.id_path.bias, dtype) if isinstance(block.id_path, Conv) else None
        self.inner = [(Winograd if pays(conv) else Packed)(conv.weight, conv.bias, dtype) for conv in inner]
        self.last = Packed(last.weight * block.gain, last.bias * block.gain, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Keep height and width; `x` is lost."""
        branch, rectified = x, False
        for conv in self.inner:
            if isinstance(conv, Winograd):
                branch, rectified = conv(branch), False
            else:
                branch, rectified = conv(branch if rectified else F.relu(branch), relu=True), True
        total = x if self.skip is None else self.skip(x)
        self.last.add_to(total, branch if rectified else branch.relu_())
        return total


def pays(conv: Conv) -> bool:
    """Whether Winograd's algorithm is faster: its transforms cost as much for few channels as for many."""
    channels_out, channels_in, _, side = conv.weight.shape
    return side == 3 and channels_in * channels_out >= WINOGRAD_PRODUCT


@final
class PreparedEncoder:
    """The encoder of fixed weights on a CPU: squeezed pixels to codes, without logits of all codes in float32.

    The first convolution is in float32 and the code is the one with the largest logit in float32, whatever dtype the
    groups compute in. The weights are copies (docs/performance.md has their size).
    """

    def __init__(self, encoder: Stack, dtype: torch.dtype):
        self.dtype = dtype
        self.first = Packed(encoder.first.weight, encoder.first.bias, torch.float32)
        self.groups = [
            [PreparedBlock(block, dtype) for block in group.children() if isinstance(block, Block)]
            for group in encoder.groups
        ]
        self.last = LargestLogit(encoder.last.weight, encoder.last.bias)

    def __call__(self, squeezed: Float[Tensor, "B 3 H W"]) -> Int64[Tensor, "B rows cols"]:
        """The code with the largest logit in every cell."""
        with torch.autocast("cpu", enabled=False):
            at_once = max(1, FINE_PIXELS // (squeezed.shape[2] * squeezed.shape[3]))
            x = torch.cat([self._fine(some) for some in torch.split(squeezed, at_once)])
            for number, blocks in enumerate(self.groups[FINE_GROUPS:]):
                x = self._group(F.max_pool2d(x, 2) if number else x, blocks)
            return self.last(x.relu_())

    def _fine(self, squeezed: Tensor) -> Tensor:
        """The first groups: their maps are large. The others have small maps and many weights, so take more frames."""
        x = self.first(squeezed.contiguous(memory_format=torch.channels_last)).to(self.dtype)
        for blocks in self.groups[:FINE_GROUPS]:
            x = F.max_pool2d(self._group(x, blocks), 2)
        return x

    def _group(self, x: Tensor, blocks: list[PreparedBlock]) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


def squeezed(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Pixels in [0, 1] as the encoder wants them (the published map_pixels)."""
    return (1 - 2 * SQUEEZE) * pixels + SQUEEZE


def unsqueezed(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """The inverse of `squeezed`, clamped to [0, 1]."""
    return ((pixels - SQUEEZE) / (1 - 2 * SQUEEZE)).clamp(0, 1)


def from_published(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the published encoder and decoder by the names they have here; unknown names are kept."""
    return {
        f"{side}.{_renamed(name)}": value
        for side, part in (("encoder", encoder), ("decoder", decoder))
        for name, value in part.items()
    }


def config_of(weights: Mapping[str, Tensor]) -> DVAEConfig:
    """The architecture that renamed weights have.

    Raises:
        KeyError: the parameters that show it are missing.
    """
    vocabulary = weights["encoder.blocks.output.conv.weight"].shape[0]
    blocks = sum(name.startswith("encoder.blocks.group_1.") and name.endswith("conv_1.weight") for name in weights)
    return DVAEConfig(
        vocab_size=vocabulary,
        n_hid=weights["encoder.blocks.input.weight"].shape[0],
        n_init=weights["decoder.blocks.input.weight"].shape[0],
        blocks=max(1, blocks),
    )


@final
class DVAETokenizer(NeuralTokenizer):
    """DALL-E's dVAE that is ready to use."""

    kind = "dvae"
    preprocessing = "RGB uint8 / 255 x 0.8 + 0.1, not resized, every frame by itself"
    network = DVAE
    architecture = DVAEConfig
    chunk_pixels: ClassVar[Mapping[str, int]] = {"cpu": 2**16, "other": 2**20}

    def __init__(
        self,
        model: Network,
        passport: Passport,
        trained: Mapping[str, Any],
        device: torch.device,
        precision: Arithmetic = "fp32",
    ):
        assert isinstance(model, DVAE)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Before the weights are lowered, so that they are rounded once.
        prepared = PreparedEncoder(model.encoder, dtype) if device.type == "cpu" and available(dtype) else None
        super().__init__(model, passport, trained, device, precision)
        if prepared is not None:
            model.prepare(prepared)


def _renamed(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    return stem + dot + {"w": "weight", "b": "bias"}.get(last, last)
