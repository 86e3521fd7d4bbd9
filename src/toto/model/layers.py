"""The parts of the decoder: rotary positions, causal attention, SwiGLU, the pre-norm block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toto.model.blockwise import attends_in_blocks, blockwise_attention
from toto.model.cache import KeyValueCache
from toto.model.config import ModelConfig
from toto.model.fused import added_normed_linear, linear, normed_linear, swiglu_linear
from toto.model.parametrisation import parametrisation


def rotary_angles(start: int, count: int, head_size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[S, K]` of positions `start .. start + count - 1`, as in LLaMA (rotate-half layout)."""
    frequencies = 1.0 / base ** (torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    positions = torch.arange(start, start + count, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B N S K"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B N S K"]:
    """Turn queries or keys by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, no biases."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.heads, self.layer = config.heads, layer
        self.scale = parametrisation(config).attention_scale(config)
        self.causal = config.causal
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        norm: nn.RMSNorm,
        angles: tuple[Tensor, Tensor],
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Attend, normed, to the same and earlier positions, those in the cache included."""
        B, S, D = x.shape
        qkv = normed_linear(x, norm, self.qkv)
        if cache is None and self.causal and attends_in_blocks(qkv):
            return linear(blockwise_attention(qkv, angles, self.heads, self.scale), self.out)
        q, k, v = qkv.view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        else:
            k, v = cache.written(self.layer, k.to(cache.keys.dtype), v.to(cache.values.dtype))
            q = q.to(k.dtype)
            mask = None if S == 1 else causal_mask(S, k.shape[2], x.device)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return linear(mixed.transpose(1, 2).reshape(B, S, D).to(x.dtype), self.out)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, gate first."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_hidden, bias=False)
        self.down = nn.Linear(config.mlp_hidden, config.width, bias=False)

    def forward(
        self, x: Float[Tensor, "B S D"], branch: Float[Tensor, "B S D"], norm: nn.RMSNorm
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S D"]]:
        """The residual stream with a branch added to it, and the next branch: each position of it by itself, normed."""
        total, gate_up = added_normed_linear(x, branch, norm, self.gate_up)
        return total, swiglu_linear(gate_up, self.down)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Float[Tensor, "B S D"], angles: tuple[Tensor, Tensor], cache: KeyValueCache | None) -> Tensor:
        """One layer of the residual stream."""
        x, branch = self.mlp(x, self.attention(x, self.attention_norm, angles, cache), self.mlp_norm)
        out: Tensor = x + branch
        return out


class Head(nn.Linear):
    """The output layer, by way of the parametrisation's multiplier; it has a bias for pixel targets only."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.width, config.outputs, bias=config.targets == "pixels")
        self.multiplier = parametrisation(config).output_multiplier(config)

    def forward(self, x: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead V"]:
        """What is predicted at each position."""
        return super().forward(x if self.multiplier == 1 else x * self.multiplier)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bool `[queries, keys]`: the last query sees all keys, the one before it all but the last, and so on."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=keys - queries)
