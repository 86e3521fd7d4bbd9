"""The decoder: token ids to logits, and the hidden states on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.model.cache import Cache, empty_cache
from toto.model.config import ModelConfig
from toto.model.layers import Block, rotary_angles
from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a forward pass returns.

    Attributes:
        logits: `[B, S, V]`.
        hidden_states: layer -> `[B, S, D]` for the asked layers; 0 is the embedding's output, l the residual stream
            after block l, before the final norm.
        cache: the given cache with these positions added; None where none was given.
    """

    logits: Float[Tensor, "B S V"]
    hidden_states: dict[int, Tensor]
    cache: Cache | None = None


class Transformer(nn.Module):
    """A causal transformer over token ids (paper, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: normal with `init_std`, less where a matrix writes into the residual stream."""
        small = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=small if writes else self.config.init_std, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(
        self, tokens: Int64[Tensor, "B S"], *, layers: Sequence[int] = (), cache: Cache | None = None
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            tokens: ids `[B, S]`; with a cache, only those after what it holds.
            layers: which hidden states to return, 0 .. number of blocks.
            cache: what was seen before; it is continued.

        Raises:
            ConfigError: a layer the model has not got, or a cache without room.
        """
        x, states, cache = self.trunk(tokens, layers=layers, cache=cache)
        return Output(logits=self.head(self.norm(x)), hidden_states=states, cache=cache)

    def trunk(
        self, tokens: Int64[Tensor, "B S"], *, layers: Sequence[int] = (), cache: Cache | None = None
    ) -> tuple[Float[Tensor, "B S D"], dict[int, Tensor], Cache | None]:
        """Like `forward` without the final norm and the output layer; returns the last residual stream first."""
        wanted = set(layers)
        if not wanted <= set(range(len(self.blocks) + 1)):
            raise ConfigError(f"layers {sorted(wanted)} asked, the model has 0 to {len(self.blocks)}", where="layers")
        start = 0
        if cache is not None:
            cache.require_room(tokens.shape[1])
            start = cache.length
        angles = rotary_angles(start, tokens.shape[1], self.config.head_size, self.config.rope_base, tokens.device)
        x = self.embedding(tokens)
        states = {0: x} if 0 in wanted else {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, angles, cache)
            if number in wanted:
                states[number] = x
        return x, states, cache.advanced(tokens.shape[1]) if cache is not None else None

    def new_cache(self, batch: int, room: int, dtype: torch.dtype = torch.float32) -> Cache:
        """An empty cache for this model, on its device."""
        return empty_cache(self.config, batch=batch, room=room, device=self.device, dtype=dtype)
