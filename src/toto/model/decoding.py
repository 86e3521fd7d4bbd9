"""A transformer prepared for drawing one token after the other.

A value made once from a model's weights, so that a step has nothing left to do but to read them. It gives the numbers
that the model gives with a cache, within rounding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from toto.model.cache import Cache, KeyValueCache, key_values
from toto.model.layers import Block, causal_mask, rotary_angles
from toto.model.parametrisation import parametrisation
from toto.model.quantised import Matrix, Weights, prepared, rounded
from toto.model.transformer import Transformer
from toto.runtime.device import use_bf16
from toto.runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer without bias in two forms.

    Attributes:
        many: `[O, I]`, for the positions of a prompt, in the precision of their products.
        few: for one position of each sequence.
    """

    many: Tensor
    few: Matrix


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A block's weights; norms are `[D]`."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What a step reads. Make another one when the model's weights have changed.

    Attributes:
        layers: the blocks.
        embedding: `[V, D]`.
        norm: the final one, `[D]`.
        head: the output layer.
        multiplier: of the output layer's input.
        norm_eps: epsilon of the norms.
        heads: N.
        cosines: `[room, 2, 1, K]`, of each position's angles, for queries times the scale of scores, and for keys.
        sines: likewise, the first half with its sign turned.
    """

    layers: tuple[Layer, ...]
    embedding: Tensor
    norm: Tensor
    head: Matrix
    multiplier: float
    norm_eps: float
    heads: int
    cosines: Tensor
    sines: Tensor

    @torch.inference_mode()
    def next_logits(self, tokens: Int64[Tensor, "B S"], cache: Cache) -> tuple[Float[Tensor, "B V"], KeyValueCache]:
        """Logits of the token after `tokens`, which follow what the cache holds, and the cache with them added.

        Raises:
            ConfigError: there is no room for them, or the cache is of another architecture.
        """
        seen, count = key_values(cache), tokens.shape[1]
        seen.require_room(count)
        if seen.length + count > len(self.cosines):
            raise ConfigError(f"has room for {len(self.cosines)} positions, {seen.length + count} are needed")
        x = self._step(tokens[:, 0], seen) if count == 1 else self._read(tokens, seen)
        x = F.rms_norm(x, self.norm.shape, self.norm, self.norm_eps)
        return self.head(x if self.multiplier == 1 else x * self.multiplier), seen.advanced(count)

    def _step(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """The last residual stream `[B, D]` of one more position."""
        x = self.embedding[tokens].float()
        B, D = x.shape
        N, K, place, end = self.heads, D // self.heads, cache.length, cache.length + 1
        cosines, sines, rows = self.cosines[place], self.sines[place], seen_rows(cache, B * N, end)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            normed = F.rms_norm(x, (D,), layer.attention_norm, self.norm_eps)
            qkv = layer.qkv.few(normed).view(B, 3, N, K)
            q, k = turned(qkv[:, :2], cosines, sines).unbind(1)
            keys[:, :, place] = k
            values[:, :, place] = qkv[:, 2]
            scores = torch.bmm(keys.flatten(0, 1)[:, :end].float(), q.reshape(B * N, 1, K).transpose(1, 2))
            mixed = summed(scores.view(B * N, end).softmax(dim=-1), values.flatten(0, 1), rows)
            x = x + layer.out.few(mixed.view(B, D))
            normed = F.rms_norm(x, (D,), layer.mlp_norm, self.norm_eps)
            gate, up = layer.gate_up.few(normed).chunk(2, dim=-1)
            x = x + layer.down.few(F.silu(gate) * up)
        return x

    def _read(self, tokens: Tensor, cache: KeyValueCache) -> Tensor:
        """The last residual stream `[B, D]` of the last of several positions; the last block computes no other one."""
        x = self.embedding[tokens].float()
        B, S, D = x.shape
        N, K, start, end = self.heads, D // self.heads, cache.length, cache.length + S
        cosines, sines = self.cosines[start:end], self.sines[start:end]
        mask = causal_mask(S, end, x.device) if start else None
        for number, layer in enumerate(self.layers):
            normed = F.rms_norm(x, (D,), layer.attention_norm, self.norm_eps)
            q, k, v = _product(normed, layer.qkv.many).view(B, S, 3, N, K).permute(2, 0, 3, 1, 4)
            q, k = (turned(each.float(), cosines[:, which, 0], sines[:, which, 0]) for which, each in enumerate((q, k)))
            q, k = q.to(v.dtype), k.to(v.dtype)
            seen_keys, seen_values = cache.written(number, k.to(cache.keys.dtype), v.to(cache.values.dtype))
            if start:
                k, v = seen_keys.to(q.dtype), seen_values.to(q.dtype)
            if number == len(self.layers) - 1:
                x, q, mask = x[:, -1:], q[:, :, -1:], None
            causal = mask is None and q.shape[2] == S
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=1.0)
            x = x + _product(mixed.transpose(1, 2).reshape(B, -1, D), layer.out.many)
            normed = F.rms_norm(x, (D,), layer.mlp_norm, self.norm_eps)
            gate, up = _product(normed, layer.gate_up.many).chunk(2, dim=-1)
            x = x + _product(F.silu(gate) * up, layer.down.many)
        return x[:, -1]


def rounded_model(model: Transformer, weights: Weights) -> Transformer:
    """A copy of the model whose matrices hold the values that they have in this precision, in float32.

    For measuring what the precision costs; the embedding and the norms are as they were.
    """
    other = copy.deepcopy(model)
    if other.config.tie_embeddings:
        other.head.weight = nn.Parameter(other.head.weight.detach().clone())
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounded(module.weight, weights))
    return other


def prepare(model: Transformer, *, batch: int, room: int, weights: Weights = "fp32") -> Decoder:
    """Copy the weights of a model of token inputs into the layouts that are read fast.

    Beside the model it takes 4 bytes a weight in fp32; in bf16 and int8 2 and 1, and 2 more for reading prompts.

    Args:
        model: left as it is.
        batch: how many sequences.
        room: how many positions at most.
        weights: their precision.

    Raises:
        ConfigError: the model takes patches, or isn't causal.
    """
    config = model.config
    if config.inputs != "tokens":
        raise ConfigError("takes patches, so there is no next token", where="model", fix="use a model of token inputs")
    model.require_causal()
    rules = parametrisation(config)
    blocks: list[Any] = list(model.blocks)
    fast = weights != "fp32" and use_bf16("auto", model.device)

    def linear(module: nn.Linear) -> Linear:
        many = rounded(module.weight, weights).to(torch.bfloat16 if fast else torch.float32)
        return Linear(many=many, few=prepared(module.weight, weights, batch))

    def layer(block: Block) -> Layer:
        return Layer(
            attention_norm=block.attention_norm.weight.detach().float(),
            qkv=linear(block.attention.qkv),
            out=linear(block.attention.out),
            mlp_norm=block.mlp_norm.weight.detach().float(),
            gate_up=linear(block.mlp.gate_up),
            down=linear(block.mlp.down),
        )

    cosines, sines = rotary_angles(0, room, config.head_size, config.rope_base, model.device)
    sines[:, : config.head_size // 2] *= -1
    scales = torch.tensor([rules.attention_scale(config), 1.0], device=model.device).view(2, 1, 1)
    return Decoder(
        layers=tuple(layer(block) for block in blocks),
        embedding=model.embedding.weight.detach(),
        norm=next(model.norm.parameters()).detach().float(),
        head=prepared(model.head.weight, weights, batch),
        multiplier=rules.output_multiplier(config),
        norm_eps=config.norm_eps,
        heads=config.heads,
        cosines=cosines[:, None, None] * scales,
        sines=sines[:, None, None] * scales,
    )


def seen_rows(cache: KeyValueCache, heads: int, end: int) -> Int64[Tensor, "heads end"]:
    """The first `end` positions of every head, as rows of values `[heads x room, K]`."""
    firsts = torch.arange(0, heads * cache.room, cache.room, device=cache.keys.device)
    return firsts[:, None] + torch.arange(end, device=firsts.device)


def summed(
    weights: Float[Tensor, "heads end"], values: Float[Tensor, "heads room K"], rows: Int64[Tensor, "heads end"]
) -> Float[Tensor, "heads K"]:
    """The weighted sum of each head's first values. On a CPU an embedding bag reads them fastest."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        return F.embedding_bag(rows, values.flatten(0, 1), mode="sum", per_sample_weights=weights)
    return torch.bmm(weights[:, None], values[:, : weights.shape[1]].float())[:, 0]


def turned(x: Float[Tensor, "*lead K"], cosines: Tensor, sines: Tensor) -> Float[Tensor, "*lead K"]:
    """Rotate queries or keys; the first half of the sines has its sign turned."""
    swapped = x.reshape(*x.shape[:-1], 2, -1).flip(-2).flatten(-2)
    return torch.addcmul(x * cosines, swapped, sines)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)
