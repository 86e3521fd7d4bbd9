"""Mamba, made of transformers' blocks, with a scan that is fast without its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.model.baselines.config import MambaConfig
from toto.model.baselines.extra import modeling
from toto.model.baselines.scan import selective_scan
from toto.model.cache import Cache
from toto.model.causal import CausalModel, refuse_patches
from toto.model.parametrisation import WeightRule
from toto.runtime.errors import ConfigError

STEPS = (1e-3, 1e-1)  # step sizes begin between these
LEAST_STEP = 1e-4


@dataclass(frozen=True, kw_only=True)
class StateCache(Cache):
    """The state after the first `length` positions: of a fixed size, and never changed. Kept in fp32.

    Attributes:
        inputs: `[layers, B, conv_kernel - 1, E]`, what the convolutions still see.
        states: `[layers, B, E, G]`.
    """

    inputs: Tensor
    states: Tensor

    def require_room(self, count: int) -> None:
        """There is always room."""


class Mamba(CausalModel):
    """Mamba over token ids: RMSNorm before each mixer, no positions and no attention."""

    config: MambaConfig

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        theirs = modeling("mamba")
        described = theirs.MambaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            time_step_rank=config.step_rank,
            layer_norm_epsilon=config.norm_eps,
        )
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(theirs.MambaBlock(described, layer_idx=layer) for layer in range(config.layers))
        self.norm = theirs.MambaRMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, as state-spaces/mamba does; matrices uniformly within 1 / sqrt(inputs)."""
        for part in (self.embedding, self.head):
            nn.init.normal_(part.weight, std=self.config.init_std, generator=generator)
        blocks: list[Any] = list(self.blocks)
        norms: list[Any] = [self.norm, *(block.norm for block in blocks)]
        for norm in norms:
            nn.init.ones_(norm.weight)
        for block in blocks:
            self._reset_mixer(block.mixer, generator)

    def _reset_mixer(self, mixer: Any, generator: torch.Generator | None) -> None:
        config = self.config

        def uniform(weight: Tensor, inputs: float) -> None:
            nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5, generator=generator)

        uniform(mixer.in_proj.weight, config.width)
        uniform(mixer.conv1d.weight, config.conv_kernel)
        uniform(mixer.conv1d.bias, config.conv_kernel)
        uniform(mixer.x_proj.weight, config.channels)
        uniform(mixer.dt_proj.weight, config.step_rank)
        uniform(mixer.out_proj.weight, config.channels * config.layers)
        least, most = (math.log(step) for step in STEPS)
        nn.init.uniform_(mixer.dt_proj.bias, least, most, generator=generator)
        steps = mixer.dt_proj.bias.exp().clamp(min=LEAST_STEP)
        mixer.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus of it is the step
        mixer.A_log.copy_(torch.arange(1, config.state_size + 1).log().expand_as(mixer.A_log))
        nn.init.ones_(mixer.D)

    def weight_rules(self) -> dict[str, WeightRule]:
        """One rate for all; matrices decay, but neither A nor D nor what has one dimension."""
        return {
            name: WeightRule(decay=float(weight.ndim >= 2 and not name.endswith("A_log")))
            for name, weight in self.named_parameters()
        }

    @property
    def calls_blocks(self) -> bool:
        """Our own scan takes the blocks' parts."""
        return self.config.calls_blocks

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
        wanted = self.wanted(layers)
        if cache is not None and not isinstance(cache, StateCache):
            raise ConfigError("is of another architecture", where="cache", fix="make it with this model's new_cache")
        before = cache or self.new_cache(len(tokens), 0)
        by_transformers = self.config.scan == "transformers" and cache is None
        x = self.embedding(tokens)
        states = {0: x} if 0 in wanted else {}
        after: list[tuple[Tensor, Tensor]] = []
        block: Any
        for number, block in enumerate(self.blocks, start=1):
            if by_transformers:
                x = block(x)
            else:
                past = before.inputs[number - 1], before.states[number - 1]
                mixed, past = self._mixed(block.mixer, block.norm(x), *past)
                x = x + mixed
                after.append(past)
            if number in wanted:
                states[number] = x
        if cache is None:
            return x, states, None
        inputs, ends = (torch.stack(kept) for kept in zip(*after, strict=True))
        return x, states, StateCache(inputs=inputs, states=ends, length=cache.length + tokens.shape[1])

    def _mixed(
        self, mixer: Any, x: Float[Tensor, "B S D"], inputs: Tensor, state: Tensor
    ) -> tuple[Float[Tensor, "B S D"], tuple[Tensor, Tensor]]:
        """What a block's mixer gives, what its convolution will still see, and its state after the last position."""
        S, config = x.shape[1], self.config
        new, gate = mixer.in_proj(x).chunk(2, dim=-1)
        seen = torch.cat([inputs.to(new.dtype), new], dim=1)
        kernel = mixer.conv1d.weight[:, 0]
        mixed = mixer.conv1d.bias + sum(seen[:, tap : tap + S] * kernel[:, tap] for tap in range(config.conv_kernel))
        u = F.silu(mixed).to(new.dtype)
        low, B, C = mixer.x_proj(u).split([config.step_rank, config.state_size, config.state_size], dim=-1)
        dt = F.softplus(F.linear(low, mixer.dt_proj.weight).float() + mixer.dt_proj.bias.float())
        y, state = selective_scan(u, dt, -torch.exp(mixer.A_log.float()), B, C, state)
        y = (y + u * mixer.D) * F.silu(gate)
        return mixer.out_proj(y.to(x.dtype)), (seen[:, S:].float(), state)

    def new_cache(self, batch: int, room: int, dtype: torch.dtype = torch.float32) -> StateCache:
        """The state before the first position; its size doesn't depend on `room`, and it is fp32 whatever `dtype`."""
        config = self.config
        return StateCache(
            inputs=torch.zeros(config.layers, batch, config.conv_kernel - 1, config.channels, device=self.device),
            states=torch.zeros(config.layers, batch, config.channels, config.state_size, device=self.device),
            length=0,
        )
