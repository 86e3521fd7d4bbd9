"""What a model has already seen of some sequences, as an explicit value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cache(ABC):
    """What a model keeps of the first `length` positions; each architecture has a kind of its own.

    A model that is given a cache returns a new one with a larger `length`.

    Attributes:
        length: how many positions were seen.
    """

    length: int

    @abstractmethod
    def require_room(self, count: int) -> None:
        """Refuse more positions than fit."""


@dataclass(frozen=True, kw_only=True)
class KeyValueCache(Cache):
    """Keys and values of the first `length` positions, with room for more.

    The new cache that a model returns shares its storage with the old one, which stays true as long as it is not
    continued a second time.

    Attributes:
        keys: `[layers, B, N, room, K]`, rotated.
        values: `[layers, B, N, room, K]`.
    """

    keys: Tensor
    values: Tensor

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

    def advanced(self, count: int) -> KeyValueCache:
        """The cache with `count` more positions filled."""
        return replace(self, length=self.length + count)

    def require_room(self, count: int) -> None:
        """Refuse more positions than fit."""
        if self.length + count > self.room:
            raise ConfigError(f"cache has room for {self.room} positions, {self.length + count} are needed")


def key_values(cache: Cache) -> KeyValueCache:
    """The cache as one of keys and values; another architecture's is refused."""
    if not isinstance(cache, KeyValueCache):
        raise ConfigError("is of another architecture", where="cache", fix="make it with this model's new_cache")
    return cache


def empty_cache(
    *,
    layers: int,
    heads: int,
    head_size: int,
    batch: int,
    room: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> KeyValueCache:
    """A cache with nothing in it yet."""
    shape = (layers, batch, heads, room, head_size)
    return KeyValueCache(
        keys=torch.zeros(shape, device=device, dtype=dtype),
        values=torch.zeros(shape, device=device, dtype=dtype),
        length=0,
    )
