"""The decoder: token ids, or patches of pixels, to predictions, and the hidden states on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.model.cache import Cache, KeyValueCache, empty_cache, key_values
from toto.model.causal import CausalModel, draw_by_rules, refuse_patches
from toto.model.config import ModelConfig
from toto.model.layers import Block, Head, rotary_angles
from toto.model.parametrisation import WeightRule, parametrisation
from toto.runtime.errors import ConfigError


class Transformer(CausalModel):
    """A causal transformer over token ids, or over patches between special ids (paper, section 3.2)."""

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.embedded_ids, config.width)
        if config.inputs == "patches":
            self.patch_embedding = nn.Linear(config.values_in_patch, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, by the rules of the parametrisation."""
        draw_by_rules(self, generator)

    def weight_rules(self) -> dict[str, WeightRule]:
        """How each weight begins and how its steps are scaled, by its name."""
        rule = parametrisation(self.config).rule
        return {name: rule(name, weight.ndim, self.config) for name, weight in self.named_parameters()}

    def trunk(
        self,
        tokens: Int64[Tensor, "B S"],
        *,
        patches: Float[Tensor, "B N P"] | None = None,
        layers: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B S D"], dict[int, Tensor], Cache | None]:
        """Like `forward` without the final norm and the output layer; returns the last residual stream first."""
        wanted = self.wanted(layers)
        seen = None if cache is None else key_values(cache)
        start = 0
        if seen is not None:
            seen.require_room(tokens.shape[1])
            start = seen.length
        angles = rotary_angles(start, tokens.shape[1], self.config.head_size, self.config.rope_base, tokens.device)
        x = self._embedded(tokens, patches, start)
        states = {0: x} if 0 in wanted else {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, angles, seen)
            if number in wanted:
                states[number] = x
        return x, states, seen.advanced(tokens.shape[1]) if seen is not None else None

    def _embedded(self, tokens: Tensor, patches: Tensor | None, start: int) -> Float[Tensor, "B S D"]:
        """What goes into the first block.

        With patch inputs, a sequence is a start id, patches, and perhaps an end id:

            tokens    start  code  code ... code  end
            patches            0     1  ... N - 1
        """
        if self.config.inputs == "tokens":
            refuse_patches(patches)
            out: Tensor = self.embedding(tokens)
            return out
        if patches is None:
            raise ConfigError("the model's inputs are patches, and none are given", where="patches")
        before = 1 if start == 0 else 0
        end = before + patches.shape[1]
        if tokens.shape[1] not in (end, end + 1):
            raise ConfigError(f"{patches.shape[1]} don't fit a sequence of {tokens.shape[1]} ids", where="patches")
        seen = self.patch_embedding(patches)
        return torch.cat([self.embedding(tokens[:, :before]), seen, self.embedding(tokens[:, end:])], dim=1)

    def new_cache(self, batch: int, room: int, dtype: torch.dtype = torch.float32) -> KeyValueCache:
        """An empty cache for this model, on its device."""
        config = self.config
        return empty_cache(
            layers=config.layers,
            heads=config.heads,
            head_size=config.head_size,
            batch=batch,
            room=room,
            device=self.device,
            dtype=dtype,
        )
