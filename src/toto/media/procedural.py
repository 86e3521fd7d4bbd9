"""The procedural corpus: short clips of a textured moving shape, made by code, with exact labels.

Six motions: the shape drifts in one of four directions or turns in one of two. Position, size, form, texture,
speed and background are drawn independently of the motion, and a drifting shape that leaves on one side comes back
on the other, so no single frame says anything about the label. In some clips a bar stands in front of the shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor

from toto.media.clip import Clip
from toto.runtime.seed import stream

BARS = ("none", "upright", "lying")
MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise")
FRAME_RATE = 6.0
Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ProceduralClip:
    """A made clip with what is known about it.

    Attributes:
        clip: the frames.
        label: index into `MOTIONS`.
        bar: index into `BARS`: what stands in front of the shape.
        mask: bool `[T, H, W]`, where the shape is visible.
        whole_mask: bool `[T, H, W]`, where the shape is, occluded or not.
    """

    clip: Clip
    label: int
    bar: int
    mask: Bool[Tensor, "T H W"]
    whole_mask: Bool[Tensor, "T H W"]

    @cached_property
    def visible(self) -> list[float]:
        """The visible share of the shape in each frame."""
        whole = self.whole_mask.sum(dim=(1, 2)).clamp(min=1)
        return [float(share) for share in self.mask.sum(dim=(1, 2)) / whole]


def make_clip(seed: int, number: int, *, frames: int = 16, size: int = 64) -> ProceduralClip:
    """Make clip `number` of the corpus `seed`; labels take turns, so any 6 in a row hold each motion once.

    Args:
        seed: which corpus.
        number: which clip of it, from 0.
        frames: T.
        size: height and width in pixels.
    """
    rng = stream(seed, "procedural", number)
    label = number % len(MOTIONS)
    bar_kind = int(rng.choice(len(BARS), p=(0.5, 0.25, 0.25)))  # first of all draws, so that no other moves it
    background = 60 + 120 * _texture(rng, size, smoothness=6)[:, :, None] * rng.uniform(0.5, 1.0, 3)
    paint = 255 * (0.35 * _texture(rng, size, smoothness=2)[:, :, None] + 0.65 * rng.uniform(0, 1, 3))
    radius, corners = rng.uniform(0.17, 0.26) * size, int(rng.integers(3, 6))
    start, angle = rng.uniform(0, size, 2), rng.uniform(0, 2 * np.pi)
    speed, turn = rng.uniform(0.025, 0.05) * size, rng.uniform(0.12, 0.25)
    bar = _bar(rng, size, bar_kind)
    bar_paint = 255 * rng.uniform(0, 1, 3) * np.ones((size, size, 1))

    pictures, wholes = [], []
    for time in range(frames):
        motion = MOTIONS[label]
        shift = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}.get(motion, (0, 0))
        spin = {"clockwise": 1, "counterclockwise": -1}.get(motion, 0) * turn * time
        centre = start + speed * time * np.array(shift)
        rows, columns = _from_centre(size, centre)
        along, across = _rotated(rows, columns, angle + spin)
        whole = _polygon(along, across, radius, corners)
        texel = (np.round(along) % size).astype(int), (np.round(across) % size).astype(int)
        picture = np.where(whole[:, :, None], paint[texel], background)
        pictures.append(np.where(bar[:, :, None], bar_paint, picture))
        wholes.append(whole)
    whole_mask = torch.from_numpy(np.stack(wholes))
    clip = Clip(
        frames=torch.from_numpy(np.stack(pictures).clip(0, 255).astype(np.uint8)),
        indices=torch.arange(frames),
        timestamps=torch.arange(frames, dtype=torch.float64) / FRAME_RATE,
        source=f"procedural/{seed}/{number}",
        rate=FRAME_RATE,
    )
    return ProceduralClip(
        clip=clip, label=label, bar=bar_kind, mask=whole_mask & ~torch.from_numpy(bar), whole_mask=whole_mask
    )


def _texture(rng: np.random.Generator, size: int, *, smoothness: int) -> Array:
    """Noise in [0, 1] that wraps around, smooth over about `smoothness` pixels."""
    noise = np.fft.rfft2(rng.standard_normal((size, size)))
    rows, columns = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    smooth = np.fft.irfft2(noise * np.exp(-0.5 * (2 * np.pi * smoothness) ** 2 * (rows**2 + columns**2)), (size, size))
    spread: Array = (smooth - smooth.min()) / np.ptp(smooth)
    return spread


def _from_centre(size: int, centre: Array) -> tuple[Array, Array]:
    """Each pixel's offset from the centre on a picture that wraps around, in rows and columns."""
    half = size / 2
    rows, columns = ((np.arange(size) - place + half) % size - half for place in centre)
    return np.broadcast_to(rows[:, None], (size, size)), np.broadcast_to(columns[None, :], (size, size))


def _rotated(rows: Array, columns: Array, angle: float) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * rows - sin * columns, sin * rows + cos * columns


def _polygon(along: Array, across: Array, radius: float, corners: int) -> Mask:
    """Where a regular polygon lies, given each pixel's offset in its own frame."""
    sector = 2 * np.pi / corners
    theta = (np.arctan2(across, along) % sector) - sector / 2
    inside: Mask = np.hypot(along, across) * np.cos(theta) <= radius * np.cos(sector / 2) * 1.2
    return inside


def _bar(rng: np.random.Generator, size: int, kind: int) -> Mask:
    """Where the bar is: nowhere, or across the picture, upright or lying."""
    place, width = rng.integers(size // 8, size - size // 4), max(2, size // 10)
    bar = np.zeros((size, size), dtype=bool)
    if BARS[kind] != "none":
        bar[:, place : place + width] = True
    return bar.T.copy() if BARS[kind] == "lying" else bar
