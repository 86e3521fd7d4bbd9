"""GPT-2 with absolute sin-cos positions, made of transformers' blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.model.baselines.config import GPT2Config
from toto.model.baselines.extra import modeling
from toto.model.cache import Cache, KeyValueCache, empty_cache, key_values
from toto.model.causal import CausalModel, draw_by_rules, refuse_patches
from toto.model.layers import causal_mask
from toto.model.parametrisation import WeightRule

WRITERS = "c_proj.weight"  # matrices that write into the residual stream
PERIODS = 10_000.0  # the longest wave is this many x 2 pi positions (arXiv 1706.03762, section 3.5)


def sin_cos(start: int, count: int, width: int, device: torch.device) -> Float[Tensor, "S D"]:
    """Sines at even channels and cosines at odd ones, of positions `start .. start + count - 1`."""
    frequencies = 1.0 / PERIODS ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    positions = torch.arange(start, start + count, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class GPT2(CausalModel):
    """GPT-2 over token ids: LayerNorm before attention and a GELU MLP, with biases."""

    config: GPT2Config

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        theirs = modeling("gpt2")
        described = theirs.GPT2Config(
            vocab_size=config.vocabulary,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.mlp_hidden,
            layer_norm_epsilon=config.norm_eps,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(theirs.GPT2Block(described, layer_idx=layer) for layer in range(config.layers))
        attention: Any
        for attention in (block.attn for block in self.blocks):
            attention._buffers.clear()  # transformers 5.0 keeps a mask there, which this attention doesn't look at
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as GPT-2 does."""
        draw_by_rules(self, generator)

    def weight_rules(self) -> dict[str, WeightRule]:
        """One rate for all; matrices decay. Norms begin as one, biases as zero."""
        return {name: self._rule(name, weight.ndim) for name, weight in self.named_parameters()}

    def _rule(self, name: str, dimensions: int) -> WeightRule:
        if dimensions < 2:
            return WeightRule(mean=0.0 if name.endswith("bias") else 1.0)
        std = self.config.init_std
        return WeightRule(std=std / math.sqrt(2 * self.config.layers) if name.endswith(WRITERS) else std, decay=1.0)

    def trunk(
        self,
        tokens: Int64[Tensor, "B S"],
        *,
        patches: Float[Tensor, "B N P"] | None = None,
        layers: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "B S D"], dict[int, Tensor], Cache | None]:
        """Like `forward` without the final norm and the output layer; returns the last residual stream first."""
        refuse_patches(patches)
        wanted, S = self.wanted(layers), tokens.shape[1]
        past = None if cache is None else _Past(key_values(cache))
        start, mask = 0, None
        if past is not None:
            past.cache.require_room(S)
            start = past.cache.length
            mask = None if S == 1 else causal_mask(S, start + S, tokens.device)[None, None]
        positions = sin_cos(start, S, self.config.width, tokens.device)
        x = self.embedding(tokens) + self.config.position_scale * positions
        states = {0: x} if 0 in wanted else {}
        for number, block in enumerate(self.blocks, start=1):
            out = block(x, past_key_values=past, attention_mask=mask)
            x = out[0] if isinstance(out, tuple) else out  # transformers 5.0 gives a tuple
            if number in wanted:
                states[number] = x
        return x, states, past.cache.advanced(S) if past is not None else None

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


@dataclass(frozen=True)
class _Past:
    """Our cache, as the attention of transformers' blocks asks for it."""

    cache: KeyValueCache

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write what is new; returns the keys and values of all positions up to it, in the precision they came in."""
        kept = self.cache.keys.dtype
        every_key, every_value = self.cache.written(layer, keys.to(kept), values.to(kept))
        return every_key.to(keys.dtype), every_value.to(values.dtype)
