"""The key/value cache as an explicit value: what a model has already seen of some sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toto.model.config import ModelConfig
from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of the first `length` positions, with room for more.

    A model that is given a cache returns a new one with a larger `length`; both share their storage. The old value
    stays true as long as it is not continued a second time.

    Attributes:
        keys: `[layers, B, N, room, K]`, rotated.
        values: `[layers, B, N, room, K]`.
        length: how many positions are filled.
    """

    keys: Tensor
    values: Tensor
    length: int

    @property
    def room(self) -> int:
        """How many positions fit."""
        return self.keys.shape[3]

    def written(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values `[B, N, S, K]` of new positions; returns those of all positions up to them."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advanced(self, count: int) -> Cache:
        """The cache with `count` more positions filled."""
        return replace(self, length=self.length + count)

    def require_room(self, count: int) -> None:
        """Refuse more positions than fit."""
        if self.length + count > self.room:
            raise ConfigError(f"cache has room for {self.room} positions, {self.length + count} are needed")


def empty_cache(
    config: ModelConfig,
    *,
    batch: int,
    room: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Cache:
    """A cache with nothing in it yet."""
    shape = (config.layers, batch, config.heads, room, config.head_size)
    return Cache(
        keys=torch.zeros(shape, device=device, dtype=dtype),
        values=torch.zeros(shape, device=device, dtype=dtype),
        length=0,
    )
