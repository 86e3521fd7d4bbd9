"""Continuing a video: the codes of a prompt's frames in, the codes of prompt and new frames out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from toto.generation.sampler import SamplerConfig, sample
from toto.model.cache import Cache
from toto.model.causal import CausalModel
from toto.model.decoding import prepare
from toto.model.quantised import Weights
from toto.model.transformer import Transformer
from toto.runtime.errors import ConfigError
from toto.tokens.sequence import CODE_OFFSET, pack_prompt, sequence_length

NextLogits = Callable[[Tensor, Any], tuple[Tensor, Cache | None]]  # new tokens, and what was seen before


@torch.inference_mode()
def continue_codes(
    model: CausalModel,
    prompt: Int64[Tensor, "B P rows cols"],
    *,
    new_frames: int,
    context_frames: int,
    sampler: SamplerConfig,
    use_cache: bool = True,
    weights: Weights = "fp32",
    on_frame: Callable[[], object] | None = None,
) -> Int64[Tensor, "B T rows cols"]:
    """Continue videos frame by frame; returns the prompt's frames and the new ones.

    Only codes are drawn, never special tokens. Beyond the context the model was trained on, the window moves: the
    older half of the frames is forgotten and the rest is read anew.

    Args:
        model: the decoder.
        prompt: codes of the prompt's frames; P may be 0.
        new_frames: how many frames to add.
        context_frames: most frames the model may see at once, the one being drawn included.
        sampler: how tokens are drawn.
        use_cache: keep keys and values; the result is the same, without it each token costs a whole pass.
        weights: precision of the weights; bf16 and int8 draw faster and predict a little worse (Toto models alone).
        on_frame: called after every new frame, for progress.

    Raises:
        ConfigError: the model takes patches, there is no frame to add, or its weights can't be rounded.
    """
    require_token_inputs(model, where="model")
    if new_frames < 1 or context_frames < 1:
        raise ConfigError(f"new frames {new_frames} and context {context_frames} must be at least 1")
    generator = torch.Generator().manual_seed(sampler.seed)
    codes = prompt.to(model.device)
    rows, cols = codes.shape[2:]
    visible = codes[:, -(context_frames - 1) :] if context_frames > 1 else codes[:, :0]
    room = sequence_length(context_frames, rows, cols) - 1
    next_logits = _reader(model, len(codes), room, use_cache, weights)
    cache: Cache | None = None
    for _ in range(new_frames):
        if visible.shape[1] == context_frames:
            visible, cache = (
                visible[:, -(context_frames // 2) :] if context_frames > 1 else visible[:, :0],
                None,
            )
        if cache is None and use_cache:
            cache = model.new_cache(len(codes), room)
        frame, cache = _draw_frame(next_logits, visible, cache, sampler, generator)
        visible = torch.cat([visible, frame], dim=1)
        codes = torch.cat([codes, frame], dim=1)
        if on_frame:
            on_frame()
    return codes


def require_token_inputs(model: CausalModel, *, where: str) -> None:
    """Refuse a model with patch inputs: what it predicts is not what it takes."""
    if model.config.inputs == "patches":
        raise ConfigError("takes patches, so it can't continue a clip", where=where, fix="use a model of token inputs")


def _reader(model: CausalModel, batch: int, room: int, use_cache: bool, weights: Weights) -> NextLogits:
    """What gives the logits of the next token: our transformer prepared for it, or any model as it is."""
    if isinstance(model, Transformer) and use_cache:
        decoder = prepare(model, batch=batch, room=room, weights=weights)
        return decoder.next_logits
    if weights != "fp32":
        fix = "leave it out, or keep the cache" if isinstance(model, Transformer) else "leave it out"
        raise ConfigError(f"{weights} is for Toto models with a cache", where="weights", fix=fix)
    return partial(_next_logits, model)


def _draw_frame(
    next_logits: NextLogits, visible: Tensor, cache: Cache | None, sampler: SamplerConfig, generator: torch.Generator
) -> tuple[Tensor, Cache | None]:
    """Draw the codes of one frame after the visible ones."""
    B, _, rows, cols = visible.shape
    sequence = pack_prompt(visible, "video")
    drawn: list[Tensor] = []
    for _ in range(rows * cols):
        seen = 0 if cache is None else cache.length
        logits, cache = next_logits(sequence[:, seen:], cache)
        logits[:, :CODE_OFFSET] = -math.inf
        token = sample(logits, sampler, generator)
        drawn.append(token - CODE_OFFSET)
        sequence = torch.cat([sequence, token[:, None]], dim=1)
    return torch.stack(drawn, dim=1).view(B, 1, rows, cols), cache


def _next_logits(model: CausalModel, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
    """Logits of the token after `tokens`; the output layer sees the last position alone."""
    hidden, _, cache = model.trunk(tokens, cache=cache)
    return model.head(model.norm(hidden[:, -1])).float(), cache
