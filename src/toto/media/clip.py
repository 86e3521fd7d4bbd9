"""A clip: some frames of one source, with where and when they were."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from toto.runtime.errors import MediaError


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Decoded frames of one source; validates itself on creation. An image is a clip of one frame.

    Attributes:
        frames: uint8 RGB `[T, H, W, 3]`.
        indices: int64 `[T]`, each frame's number in its source, counted from 0.
        timestamps: float64 `[T]`, seconds since the source's first frame.
        source: id of the source.
        rate: frames a second of the source (average over it), 0 for an image.
    """

    frames: UInt8[Tensor, "T H W 3"]
    indices: Int64[Tensor, " T"]
    timestamps: Float64[Tensor, " T"]
    source: str
    rate: float = 0.0

    def __post_init__(self) -> None:
        frames = self.frames
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            kind = str(frames.dtype).removeprefix("torch.")
            raise MediaError(f"frames are {kind} {list(frames.shape)}, not uint8 [T, H, W, 3]", where=self.source)
        for name, values in (("indices", self.indices), ("timestamps", self.timestamps)):
            if list(values.shape) != [len(frames)]:
                shape = list(values.shape)
                raise MediaError(f"{name} are {shape}, but there are {len(frames)} frames", where=self.source)

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Clip({count} frames of {height} x {width}, source={self.source!r}, rate={self.rate:g})"
