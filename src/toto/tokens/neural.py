"""What all neural tokenizers share: chunks of one size, exact arithmetic, and a folder with weights and passport.

A kind of tokenizer is a `Network` (pixels to codes and back) and a `NeuralTokenizer` that names it. Everything else
is here: a network need not know about files, devices, chunks or passports.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors.torch
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from toto.runtime.errors import CheckpointError, ConfigError, MediaError, TotoError
from toto.runtime.files import sha256_of, write_json, written_aside
from toto.tokens.grid import describe
from toto.tokens.passport import Passport
from toto.tokens.tokenizer import CONFIG_FILE, WEIGHTS_FILE, Arithmetic, Tokenizer

SIGNED = "RGB uint8 / 127.5 - 1, not resized, every frame by itself"
CHUNK_PIXELS = {"cpu": 2**15, "other": 2**20}  # pixels that are encoded or decoded at once


class Network(nn.Module, abc.ABC):
    """Frames to codes and back, one batch at a time; no layer may look at other frames of it.

    Attributes:
        config: the architecture, a frozen dataclass with `vocab_size` and `downsampling` (the side of a code's cell
            in pixels).
    """

    config: Any

    @abc.abstractmethod
    def encode(self, frames: UInt8[Tensor, "B H W 3"]) -> Int64[Tensor, "B rows cols"]:
        """The code of every cell."""

    @abc.abstractmethod
    def decode(self, codes: Int64[Tensor, "B rows cols"]) -> UInt8[Tensor, "B H W 3"]:
        """Frames that the codes stand for."""

    def lower(self) -> None:
        """Get ready to compute under bfloat16 autocast: a network may store some weights so. By default nothing."""


class NeuralTokenizer(Tokenizer):
    """A network that is ready to use.

    Frames are computed in chunks of one fixed size, the last one filled up: memory stays flat, and a frame's codes
    are the same whether it comes alone or with others.

    Attributes:
        kind: the name in passports and `tokenizer.json`.
        preprocessing: how a frame becomes pixels, in words that change when the pixels would.
        network: the class of the network.
        architecture: the class of its configuration.
        stored_dtype: of the weight file.
        chunk_pixels: pixels that are computed at once, on the CPU and elsewhere.
    """

    kind: ClassVar[str]
    preprocessing: ClassVar[str]
    network: ClassVar[type[Network]]
    architecture: ClassVar[type[Any]]
    stored_dtype: ClassVar[torch.dtype] = torch.float32
    chunk_pixels: ClassVar[Mapping[str, int]] = CHUNK_PIXELS

    def __init__(
        self,
        model: Network,
        passport: Passport,
        trained: Mapping[str, Any],
        device: torch.device,
        precision: Arithmetic = "fp32",
    ):
        self.device, self.precision = device, precision
        self.downsampling = model.config.downsampling
        self.trained = dict(trained)
        self._passport = passport
        self._model = model.to(device=device, dtype=torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._model.eval().requires_grad_(False)
        if precision == "bf16":
            self._model.lower()

    @property
    def passport(self) -> Passport:
        """The tokenizer's identity, without a frame size."""
        return self._passport

    @property
    def config(self) -> Any:
        """The architecture."""
        return self._model.config

    @property
    def parameters(self) -> int:
        """How many numbers the weight file holds."""
        return sum(value.numel() for value in self._model.state_dict().values())

    @torch.inference_mode()
    def encode(self, frames: UInt8[Tensor, "T H W 3"]) -> Int64[Tensor, "T rows cols"]:
        """Codes of frames whose sides are multiples of `downsampling`; each frame by itself.

        Raises:
            MediaError: these are no frames, or their sides don't fit the grid.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise MediaError(f"frames are {describe(frames)}, not uint8 [T, H, W, 3]", where=f"{self.kind} tokenizer")
        rows, cols = self.grid(frames.shape[1], frames.shape[2])
        codes = torch.empty((len(frames), rows, cols), dtype=torch.int64, device=self.device)
        with arithmetic(self.device, self.precision):
            for start, chunk, count in self._chunks(frames, rows, cols):
                codes[start : start + count] = self._model.encode(chunk)[:count]
        return codes

    @torch.inference_mode()
    def decode(self, codes: Int64[Tensor, "T rows cols"]) -> UInt8[Tensor, "T H W 3"]:
        """Frames that the codes stand for.

        Raises:
            PassportError: some codes are not this tokenizer's.
        """
        self.require_codes(codes)
        total, rows, cols = codes.shape
        size = (total, rows * self.downsampling, cols * self.downsampling, 3)
        frames = torch.empty(size, dtype=torch.uint8, device=self.device)
        with arithmetic(self.device, self.precision):
            for start, chunk, count in self._chunks(codes, rows, cols):
                frames[start : start + count] = self._model.decode(chunk)[:count]
        return frames

    def _chunks(self, items: Tensor, rows: int, cols: int) -> Iterator[tuple[int, Tensor, int]]:
        """First item, items filled up to the chunk's size with the last one, and how many are real."""
        pixels = self.chunk_pixels["cpu" if self.device.type == "cpu" else "other"]
        size = max(1, pixels // (rows * cols * self.downsampling**2))
        for start in range(0, len(items), size):
            chunk = items[start : start + size].to(self.device)
            filler = chunk[-1:].expand(size - len(chunk), *chunk.shape[1:])
            yield start, torch.cat([chunk, filler]), len(chunk)

    @classmethod
    def from_model(
        cls, model: Network, *, trained: Mapping[str, Any], device: torch.device | None = None
    ) -> NeuralTokenizer:
        """A tokenizer of this model as it will be stored: its weights are rounded to `stored_dtype`.

        Args:
            model: the trained model; it is copied.
            trained: what made it (recipe, steps, figures), for `tokenizer.json`.
            device: where it computes; the CPU where None.
        """
        content = cls._stored(model)
        passport = cls._passport_of(hashlib.sha256(content).hexdigest(), model.config)
        copy = cls.empty(model.config)
        copy.load_state_dict(safetensors.torch.load(content), assign=True)
        return cls(copy, passport, trained, device or torch.device("cpu"))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `model.safetensors` into a folder, the weights first.

        Raises:
            ConfigError: it computes in bfloat16, for which its weights may have been rounded.
        """
        if self.precision != "fp32":
            raise ConfigError("its weights are rounded for bf16", where=folder, fix="save it as loaded in fp32")
        with written_aside(folder / WEIGHTS_FILE) as aside:
            aside.write_bytes(self._stored(self._model))
        plain = {
            "kind": self.kind,
            "architecture": dataclasses.asdict(self.config),
            "passport": self.passport.to_dict(),
            "trained": self.trained,
        }
        write_json(folder / CONFIG_FILE, plain)

    @classmethod
    def from_folder(
        cls, folder: Path, config: dict[str, Any], device: torch.device, precision: Arithmetic = "fp32"
    ) -> NeuralTokenizer:
        """Load from a tokenizer folder whose `tokenizer.json` has been read.

        Raises:
            CheckpointError: the weights are missing, damaged, not finite, or not of this architecture or passport.
            PassportError: the passport can't be read.
        """
        place = folder / CONFIG_FILE
        if missing := {"architecture", "passport", "trained"} - set(config):
            raise CheckpointError(f"lacks {', '.join(sorted(missing))}", where=place, fix="make the tokenizer again")
        passport = Passport.from_dict(config["passport"], where=str(place))
        architecture = read_architecture(cls.architecture, config["architecture"], where=place)
        told = (passport.kind, passport.preprocessing, passport.vocab_size)
        wanted = (cls.kind, cls.preprocessing, architecture.vocab_size)
        if told != wanted:
            raise CheckpointError(f"the passport says {told}, but this is {wanted}", where=place, fix="make it again")
        model = cls.empty(architecture)
        weights = read_weights(folder / WEIGHTS_FILE, passport.weights_sha256, model)
        model.load_state_dict(weights, assign=True)
        return cls(model, passport, config["trained"], device, precision)

    @classmethod
    def empty(cls, architecture: Any) -> Network:
        """The network without weights, which the caller loads."""
        with torch.device("meta"):
            return cls.network(architecture)

    @classmethod
    def _passport_of(cls, sha256: str, architecture: Any) -> Passport:
        return Passport(
            kind=cls.kind,
            weights_sha256=sha256,
            preprocessing=cls.preprocessing,
            vocab_size=architecture.vocab_size,
        )

    @classmethod
    def _stored(cls, model: Network) -> bytes:
        """The weight file: every number in `stored_dtype`, safetensors."""
        return safetensors.torch.save(
            {
                name: value.detach().to("cpu", cls.stored_dtype).contiguous()
                for name, value in model.state_dict().items()
            }
        )


def to_pixels(frames: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Frames as pixels in [-1, 1]; channels-last in memory, as the frames are. `SIGNED` says it in words."""
    planes = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    return planes.contiguous(memory_format=torch.channels_last)


def to_frames(pixels: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    """The inverse of `to_pixels`, rounded and clamped."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def read_architecture(kind: type[Any], plain: Any, *, where: Path) -> Any:
    """Read a frozen dataclass (of numbers, tuples and other such dataclasses) back from JSON.

    Raises:
        CheckpointError: fields are unknown or missing, or of another type.
    """
    try:
        return _read(kind, plain)
    except (TypeError, ValueError, KeyError, AttributeError, TotoError) as error:
        raise CheckpointError(
            f"architecture of the tokenizer can't be read ({error})",
            where=where,
            fix="use the version of toto that made it",
        ) from None


def _read(kind: Any, plain: Any) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(plain, dict):
            raise TypeError(f"{plain!r} is no table")
        hints = typing.get_type_hints(kind)
        if odd := sorted(set(plain) ^ {field.name for field in dataclasses.fields(kind)}):
            raise TypeError(f"missing or unknown fields: {', '.join(odd)}")
        return typing.cast(Any, kind)(**{name: _read(hints[name], value) for name, value in plain.items()})
    if origin is tuple:
        parts = typing.get_args(kind)
        if not isinstance(plain, list | tuple):
            raise TypeError(f"{plain!r} is no list")
        inner = [parts[0]] * len(plain) if parts[1:] == (...,) else list(parts)
        return tuple(_read(part, value) for part, value in zip(inner, plain, strict=True))
    if origin in (Literal, types.UnionType):
        if origin is Literal and plain not in typing.get_args(kind):
            raise TypeError(f"{plain!r} is none of {typing.get_args(kind)}")
        return plain
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    if type(plain) is not kind:
        raise TypeError(f"{plain!r} is no {kind.__name__}")
    return plain


def read_weights(path: Path, sha256: str, model: nn.Module) -> dict[str, Tensor]:
    """Read a weight file, held against its hash and against the names and shapes the model has; as float32."""
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
    return {name: value.float() for name, value in weights.items()}


def require_weights(
    weights: Mapping[str, Tensor], model: nn.Module, *, where: Path | str, fix: str = "restore both files"
) -> None:
    """Refuse weights with other names or shapes than the model's, naming all of them, or with numbers not finite."""
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    odd = [f"{name} is missing" for name in wanted if name not in found]
    odd += [f"{name} is surplus" for name in found if name not in wanted]
    odd += [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    if odd:
        raise CheckpointError(f"weights don't fit the architecture: {', '.join(odd)}", where=where, fix=fix)
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"weights are not finite: {', '.join(broken)}", where=where, fix="use other weights")


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: Arithmetic) -> Iterator[None]:
    """Compute in float32 proper (no autocast, no TF32, one fixed choice of algorithms), or in bfloat16 autocast."""
    cudnn = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    )
    with cudnn, torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield
