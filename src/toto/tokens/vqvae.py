"""The small VQ-VAE: a convolutional autoencoder whose narrow waist is one of `vocab_size` unit vectors a cell.

The paper's family (DALL-E's dVAE) at laptop size: f8, so 128 px become 16 x 16 codes and 64 px 8 x 8. Nearly all
work happens at 1/4 and 1/8 of the frame's sides:

    frame -> space-to-depth 4 -> blocks at 1/4 -> stride 2 -> blocks at 1/8 -> unit vectors -> nearest code
    codes -> their vectors -> blocks at 1/8 -> depth-to-space 2 -> blocks at 1/4 -> depth-to-space 4 -> frame

No layer looks at other frames or at statistics of the batch. A code is the nearest vector of the codebook by angle.
Training is in `toto.training.tokenizer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from toto.runtime.errors import CheckpointError, MediaError
from toto.runtime.files import sha256_of, write_json, written_aside
from toto.tokens.grid import describe
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import CONFIG_FILE, WEIGHTS_FILE, Tokenizer

KIND: Final = "vqvae"
PREPROCESSING: Final = "RGB uint8 / 127.5 - 1, not resized, every frame by itself"
STEM: Final = 4  # sides of the pixel squares that become channels at either end
DOWNSAMPLING: Final = 2 * STEM
CHUNK_PIXELS: Final = {"cpu": 2**15, "other": 2**20}  # pixels that are encoded or decoded at once


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

    def to_dict(self) -> dict[str, Any]:
        """The architecture as `tokenizer.json` holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Any, *, where: Path) -> VQVAEConfig:
        """Read an architecture back; unknown or missing fields are refused."""
        try:
            values = dict(plain)
            for side in ("encoder", "decoder"):
                values[side] = StackConfig(**{key: tuple(value) for key, value in values[side].items()})
            return cls(**values)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"architecture of the dVAE can't be read ({error})",
                where=where,
                fix="use the version of toto that made it",
            ) from None


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
class VQVAE(nn.Module):
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


def to_pixels(frames: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, "T 3 H W"]:
    """Frames as the encoder wants them; `PREPROCESSING` says it in words."""
    planes = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    return planes.contiguous(memory_format=torch.channels_last)


def to_frames(pixels: Float[Tensor, "T 3 H W"]) -> UInt8[Tensor, "T H W 3"]:
    """The inverse of `to_pixels`, rounded and clamped."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


@final
class VQVAETokenizer(Tokenizer):
    """A small VQ-VAE that is ready to use.

    Frames are computed in chunks of one fixed size, the last one filled up: memory stays flat, and a frame's codes
    are the same whether it comes alone or with others. Weights are computed in float32, also under autocast.
    """

    downsampling = DOWNSAMPLING

    def __init__(self, model: VQVAE, passport: Passport, trained: Mapping[str, Any], device: torch.device):
        self.device = device
        self.trained = dict(trained)
        self._passport = passport
        self._model = model.to(device=device, dtype=torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model.eval().requires_grad_(False)
        self._chunk_pixels = CHUNK_PIXELS["cpu" if device.type == "cpu" else "other"]

    @property
    def passport(self) -> Passport:
        """The tokenizer's identity, without a frame size."""
        return self._passport

    @property
    def config(self) -> VQVAEConfig:
        """The architecture."""
        config: VQVAEConfig = self._model.config
        return config

    @property
    def parameters(self) -> int:
        """How many numbers the weight file holds."""
        return sum(value.numel() for value in self._model.state_dict().values())

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "T H W 3"]) -> Int64[Tensor, "T rows cols"]:
        """Codes of frames whose sides are multiples of 8; each frame by itself.

        Raises:
            MediaError: these are no frames, or their sides don't fit the grid.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise MediaError(f"frames are {describe(frames)}, not uint8 [T, H, W, 3]", where=f"{KIND} tokenizer")
        rows, cols = self.grid(frames.shape[1], frames.shape[2])
        codes = torch.empty((len(frames), rows, cols), dtype=torch.int64, device=self.device)
        with exact(self.device):
            for start, chunk, count in self._chunks(frames, rows, cols):
                latents = self._model.latents(to_pixels(chunk))
                codes[start : start + count] = self._model.nearest(latents)[:count]
        return codes

    @torch.inference_mode()
    def decode(self, codes: Int64[Tensor, "T rows cols"]) -> UInt8[Tensor, "T H W 3"]:
        """Frames that the codes stand for.

        Raises:
            PassportError: some codes are not this tokenizer's.
        """
        self.require_codes(codes)
        count, rows, cols = codes.shape
        size = (count, rows * DOWNSAMPLING, cols * DOWNSAMPLING, 3)
        frames = torch.empty(size, dtype=torch.uint8, device=self.device)
        with exact(self.device):
            for start, chunk, count in self._chunks(codes, rows, cols):
                frames[start : start + count] = to_frames(self._model.pixels(self._model.codebook[chunk]))[:count]
        return frames

    def _chunks(self, items: Tensor, rows: int, cols: int) -> Iterator[tuple[int, Tensor, int]]:
        """First item, items filled up to the chunk's size with the last one, and how many are real."""
        size = max(1, self._chunk_pixels // (rows * cols * DOWNSAMPLING**2))
        for start in range(0, len(items), size):
            chunk = items[start : start + size].to(self.device)
            filler = chunk[-1:].expand(size - len(chunk), *chunk.shape[1:])
            yield start, torch.cat([chunk, filler]), len(chunk)

    @classmethod
    def from_model(
        cls, model: VQVAE, *, trained: Mapping[str, Any], device: torch.device | None = None
    ) -> VQVAETokenizer:
        """A tokenizer of this model as it will be stored: its weights are rounded to float16.

        Args:
            model: the trained model; it is copied.
            trained: what made it (recipe, steps, figures), for `tokenizer.json`.
            device: where it computes; the CPU where None.
        """
        content = stored(model)
        passport = Passport(
            kind=KIND,
            weights_sha256=hashlib.sha256(content).hexdigest(),
            preprocessing=PREPROCESSING,
            vocab_size=model.config.vocab_size,
        )
        copy = VQVAE(model.config)
        copy.load_state_dict(safetensors.torch.load(content))
        return cls(copy, passport, trained, device or torch.device("cpu"))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `model.safetensors` (float16) into a folder, the weights first."""
        with written_aside(folder / WEIGHTS_FILE) as aside:
            aside.write_bytes(stored(self._model))
        plain = {
            "kind": KIND,
            "architecture": self.config.to_dict(),
            "passport": self.passport.to_dict(),
            "trained": self.trained,
        }
        write_json(folder / CONFIG_FILE, plain)

    @classmethod
    def from_folder(cls, folder: Path, config: dict[str, Any], device: torch.device) -> VQVAETokenizer:
        """Load from a tokenizer folder whose `tokenizer.json` has been read.

        Raises:
            CheckpointError: the weights are missing, damaged, not finite, or not of this architecture or passport.
            PassportError: the passport can't be read.
        """
        place = folder / CONFIG_FILE
        if missing := {"architecture", "passport", "trained"} - set(config):
            raise CheckpointError(f"lacks {', '.join(sorted(missing))}", where=place, fix="make the tokenizer again")
        passport = Passport.from_dict(config["passport"], where=str(place))
        architecture = VQVAEConfig.from_dict(config["architecture"], where=place)
        told = (passport.kind, passport.preprocessing, passport.vocab_size)
        if told != (KIND, PREPROCESSING, architecture.vocab_size):
            wanted = (KIND, PREPROCESSING, architecture.vocab_size)
            raise CheckpointError(f"the passport says {told}, but this is {wanted}", where=place, fix="make it again")
        model = VQVAE(architecture)
        model.load_state_dict(read_weights(folder / WEIGHTS_FILE, passport.weights_sha256, model))
        return cls(model, passport, config["trained"], device)


def stored(model: VQVAE) -> bytes:
    """The weight file: every number as float16, safetensors."""
    return safetensors.torch.save(
        {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    )


def read_weights(path: Path, sha256: str, model: VQVAE) -> dict[str, Tensor]:
    """Read a weight file, held against its hash and against the names and shapes the model has."""
    if not path.is_file():
        raise CheckpointError("no weights here", where=path, fix="restore the tokenizer folder")
    if sha256_of(path) != sha256:
        raise CheckpointError(
            "these are not the weights of the passport (SHA-256 differs)", where=path, fix="restore them"
        )
    try:
        weights = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"weights can't be read ({error})", where=path, fix="restore the tokenizer folder"
        ) from None
    require_weights(weights, model, where=path)
    return weights


def require_weights(weights: Mapping[str, Tensor], model: VQVAE, *, where: Path) -> None:
    """Refuse weights with other names or shapes than the model's, naming all of them, or with numbers not finite."""
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    odd = [f"{name} is missing" for name in wanted if name not in found]
    odd += [f"{name} is unknown" for name in found if name not in wanted]
    odd += [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    if odd:
        raise CheckpointError(
            f"weights don't fit the architecture: {', '.join(odd)}", where=where, fix="restore both files"
        )
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"weights are not finite: {', '.join(broken)}", where=where, fix="train it again")


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast, no TF32, and one fixed choice of algorithms."""
    cudnn = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    )
    with cudnn, torch.autocast(device.type, enabled=False):
        yield
