"""The decoder: token ids, or patches of pixels, to predictions, and the hidden states on the way."""

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
        logits: `[B, S, V]`; of a model with pixel targets the predicted normalised patches, `[B, S, P]`.
        hidden_states: layer -> `[B, S, D]` for the asked layers; 0 is the embedding's output, l the residual stream
            after block l, before the final norm.
        cache: the given cache with these positions added; None where none was given.
    """

    logits: Float[Tensor, "B S V"]
    hidden_states: dict[int, Tensor]
    cache: Cache | None = None


class Transformer(nn.Module):
    """A causal transformer over token ids, or over patches between special ids (paper, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.embedded_ids, config.width)
        if config.inputs == "patches":
            self.patch_embedding = nn.Linear(config.values_in_patch, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.outputs, bias=config.targets == "pixels")
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: normal with `init_std`, less where a matrix writes into the residual stream.

        Norms begin as one, biases as zero.
        """
        small = self.config.init_std / math.sqrt(2 * self.config.layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
                nn.init.normal_(weight, std=small if writes else self.config.init_std, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def forward(
        self,
        tokens: Int64[Tensor, "B S"],
        *,
        patches: Float[Tensor, "B N P"] | None = None,
        layers: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token, or its predicted patch, at every position.

        Args:
            tokens: ids `[B, S]`; with a cache, only those after what it holds.
            patches: for a model with patch inputs, the patches of all visual positions among `tokens`, whose ids are
                not looked at.
            layers: which hidden states to return, 0 .. number of blocks.
            cache: what was seen before; it is continued.

        Raises:
            ConfigError: a layer the model has not got, a cache without room, or patches that don't fit.
        """
        x, states, cache = self.trunk(tokens, patches=patches, layers=layers, cache=cache)
        return Output(logits=self.head(self.norm(x)), hidden_states=states, cache=cache)

    def trunk(
        self,
        tokens: Int64[Tensor, "B S"],
        *,
        patches: Float[Tensor, "B N P"] | None = None,
        layers: Sequence[int] = (),
        cache: Cache | None = None,
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
        x = self._embedded(tokens, patches, start)
        states = {0: x} if 0 in wanted else {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, angles, cache)
            if number in wanted:
                states[number] = x
        return x, states, cache.advanced(tokens.shape[1]) if cache is not None else None

    def _embedded(self, tokens: Tensor, patches: Tensor | None, start: int) -> Float[Tensor, "B S D"]:
        """What goes into the first block.

        With patch inputs, a sequence is a start id, patches, and perhaps an end id:

            tokens    start  code  code ... code  end
            patches            0     1  ... N - 1
        """
        if self.config.inputs == "tokens":
            if patches is not None:
                raise ConfigError("the model's inputs are tokens", where="patches", fix="leave them out")
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

    def new_cache(self, batch: int, room: int, dtype: torch.dtype = torch.float32) -> Cache:
        """An empty cache for this model, on its device."""
        return empty_cache(self.config, batch=batch, room=room, device=self.device, dtype=dtype)
