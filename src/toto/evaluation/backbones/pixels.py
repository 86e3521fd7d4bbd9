"""Floors that every trained backbone should be above: raw pixels, and a decoder whose weights are drawn at random."""

from __future__ import annotations

import re
from typing import Final

import torch
from jaxtyping import UInt8
from torch import Tensor

from toto.evaluation.features import Backbone, TotoBackbone, sha256_of_plain
from toto.model.architectures import described
from toto.runtime.device import pick_device
from toto.runtime.errors import ConfigError
from toto.tokens.patches import patchify

NAME: Final = re.compile(r"pixels(?::(\d+)(?:/(\d+))?)?")
SIZE: Final = 32
GRID: Final = 4


class PixelBackbone(Backbone):
    """The pixels of small frames, in grid x grid patches a frame, as the features of its only layer.

    Args:
        size: height and width that frames are resized to.
        grid: patches along each side; 1 makes a whole frame one token.
        frames: T of its clips.
    """

    def __init__(self, *, size: int = SIZE, grid: int = GRID, frames: int = 1, device: str = "auto"):
        if size < 1 or grid < 1 or size % grid:
            raise ConfigError(f"{size} pixels don't fall into {grid} patches", where=f"pixels:{size}/{grid}")
        self.name, self.grid, self._device = f"pixels:{size}/{grid}", grid, pick_device(device)
        self.frames, self.stride, self.frame_size = frames, 4, size
        self.precision, self.layers = "fp32", (0,)

    @property
    def device(self) -> torch.device:
        """Where its features are."""
        return self._device

    @property
    def weights_sha256(self) -> str:
        """It has no weights."""
        return "none"

    def width(self, layer: int) -> int:
        """Side x side x 3."""
        return 3 * (self.frame_size // self.grid) ** 2

    def prepared_as(self) -> str:
        """Its name."""
        return self.name

    @torch.inference_mode()
    def features(self, frames: UInt8[Tensor, "B T H W 3"]) -> dict[int, Tensor]:
        """Patches of -1 .. 1, `[B, T x grid x grid, side x side x 3]`."""
        return {0: patchify(frames.to(self.device), self.grid, self.grid)}


def named_pixels(name: str, *, frames: int | None = None, device: str = "auto") -> PixelBackbone:
    """`pixels`, `pixels:SIZE` or `pixels:SIZE/GRID`.

    Raises:
        ConfigError: another form, or sizes that don't fit.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ConfigError("is no name of pixels", where=name, fix=f"write pixels:SIZE/GRID, as pixels:{SIZE}/{GRID}")
    size, grid = int(found[1] or SIZE), int(found[2] or (GRID if not found[1] or int(found[1]) % GRID == 0 else 1))
    return PixelBackbone(size=size, grid=grid, frames=frames or 1, device=device)


def at_random(backbone: TotoBackbone, *, seed: int = 0) -> TotoBackbone:
    """The same backbone with all weights drawn anew; its tokenizer stays. The given one is used up."""
    generator = torch.Generator(device=backbone.device).manual_seed(seed)
    with torch.no_grad():
        backbone.model.reset_parameters(generator)
    architecture = sha256_of_plain(described(backbone.model.config))
    return TotoBackbone(
        backbone.model,
        backbone.tokenizer,
        name=f"random:{backbone.name}",
        weights_sha256=f"drawn with seed {seed} for {architecture}",
        passport=backbone.passport,
        frames=backbone.frames,
        stride=backbone.stride,
        frame_size=backbone.frame_size,
        grid=backbone.grid,
        modality=backbone.modality,
        precision=backbone.precision,
    )
