"""Patches: pixels as a model sees and predicts them where it doesn't take codes.

A frame is cut into the cells of its token grid, so a patch lies where a code does and comes in the same raster order.
A patch's P = side x side x 3 values are ordered by row, column, channel, as in MAE (facebookresearch/mae,
models_mae.py, `patchify`), and run from -1 to 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from toto.runtime.errors import ConfigError
from toto.tokens.passport import Passport

EPSILON = 1e-6  # of the variance, as in MAE


def patch_values(passport: Passport) -> int:
    """P of the frames that a passport tells of: side x side x 3, where the side is frame height / grid rows."""
    if passport.frame_size is None or passport.grid is None:
        raise ConfigError("names no frame size", where="passport", fix="take it from a store or a checkpoint")
    return _side(*passport.frame_size, *passport.grid) ** 2 * 3


def patchify(frames: UInt8[Tensor, "*lead T H W 3"], rows: int, cols: int) -> Float[Tensor, "*lead N P"]:
    """Cut frames into N = T x rows x cols patches in raster order, frame after frame; values become -1 .. 1.

    Raises:
        ConfigError: the frames don't fall into rows x cols squares.
    """
    *lead, T, H, W, _ = frames.shape
    side = _side(H, W, rows, cols)
    cells = frames.reshape(*lead, T, rows, side, cols, side, 3).transpose(-4, -3)
    return cells.reshape(*lead, T * rows * cols, side * side * 3).float() / 127.5 - 1


def unpatchify(patches: Float[Tensor, "*lead N P"], rows: int, cols: int) -> UInt8[Tensor, "*lead T H W 3"]:
    """The frames that `patchify` cut; values outside -1 .. 1 are clamped."""
    *lead, count, values = patches.shape
    side = math.isqrt(values // 3)
    cells = patches.reshape(*lead, count // (rows * cols), rows, cols, side, side, 3).transpose(-4, -3)
    frames = cells.reshape(*lead, count // (rows * cols), rows * side, cols * side, 3)
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def normalised(patches: Float[Tensor, "*lead P"]) -> Float[Tensor, "*lead P"]:
    """Each patch less its mean, over its deviation: (x - mean) / sqrt(variance + 1e-6), the variance unbiased."""
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - patches.mean(dim=-1, keepdim=True)) / (variance + EPSILON).sqrt()


def _side(height: int, width: int, rows: int, cols: int) -> int:
    side = height // rows
    if (side * rows, side * cols) != (height, width):
        raise ConfigError(
            f"frames of {height} x {width} pixels don't fall into {rows} x {cols} squares", where="patches"
        )
    return side
