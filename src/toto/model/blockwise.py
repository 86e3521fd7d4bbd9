"""Rotary positions and causal attention in bfloat16 for processors, as matrix products over blocks of queries.

torch's own kernel for processors runs at a third of the rate of a matrix product here. A block of queries sees the keys
up to its end by one product for each head; its scores are made again in the backward pass. They are rounded to
bfloat16, as everything is that a product gives; the softmax and its gradient are computed in fp32.

Operators of their own: neither torch.compile nor selective checkpointing looks inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 256  # in a block of a long sequence
SCORES = 1 << 22  # at a time, so that they stay in the processor's cache


def attends_in_blocks(qkv: Tensor) -> bool:
    """Whether attention over these queries, keys and values runs here: bfloat16 on a processor."""
    return qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16


def blockwise_attention(qkv: Tensor, angles: tuple[Tensor, Tensor], heads: int, scale: float) -> Tensor:
    """Turn queries and keys by their positions, and attend to the same and earlier positions.

    Args:
        qkv: `[B, S, 3 D]`, queries, keys and values, each head after head.
        angles: cosine and sine `[S, K]`.
        heads: N.
        scale: what scores are multiplied by.

    Returns:
        `[B, S, D]`, head after head.
    """
    cos, sin = angles
    out: Tensor = torch.ops.toto.blockwise_attention(qkv, cos, sin, heads, scale)[0]
    return out


@torch.library.custom_op(
    "toto::blockwise_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor cos, Tensor sin, int heads, float scale) -> (Tensor, Tensor)",
)
def _attention(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the result `[B, S, D]`, and turned and scaled queries, turned keys, and values `[3, B, N, S, K]`."""
    B, S, packed = qkv.shape
    K = packed // (3 * heads)
    q, k, v = qkv.view(B, S, 3, heads, K).permute(2, 0, 3, 1, 4)
    turned = qkv.new_empty(3, B, heads, S, K)
    _turn(q, cos * scale, sin * scale, out=turned[0])
    _turn(k, cos, sin, out=turned[1])
    turned[2].copy_(v)
    q, k, v = turned.flatten(1, 2)
    mixed = torch.empty_like(q)
    future = _future(S, qkv)
    for some, block, seen in _blocks(B * heads, S):
        torch.bmm(_weights(q[some, block], k[some, seen], future), v[some, seen], out=mixed[some, block])
    return mixed.view(B, heads, S, K).transpose(1, 2).reshape(B, S, heads * K), turned


@_attention.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    B, S, packed = qkv.shape
    return qkv.new_empty(B, S, packed // 3), qkv.new_empty(3, B, heads, S, packed // (3 * heads))


@torch.library.custom_op(
    "toto::blockwise_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor turned, Tensor cos, Tensor sin, float scale) -> Tensor",
)
def _attention_backward(gradient: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """The gradient of the packed queries, keys and values, `[B, S, 3 D]`."""
    _, B, N, S, K = turned.shape
    q, k, v = turned.flatten(1, 2)
    grad_out = gradient.view(B, S, N, K).transpose(1, 2).reshape(B * N, S, K)
    grads = torch.zeros_like(turned)
    grad_q, grad_k, grad_v = grads.flatten(1, 2)
    future = _future(S, turned)
    for some, block, seen in _blocks(B * N, S):
        grad_block, keys = grad_out[some, block], k[some, seen]
        grad_scores = _grad_scores(q[some, block], keys, v[some, seen], future, grad_block, grad_v[some, seen])
        torch.bmm(grad_scores, keys, out=grad_q[some, block])
        grad_k[some, seen].baddbmm_(grad_scores.mT, q[some, block])
        del grad_scores  # before there are the next ones
    packed = turned.new_empty(B, S, 3, N, K)
    to_q, to_k, to_v = packed.permute(2, 0, 3, 1, 4)
    _turn(grads[0], cos * scale, -sin * scale, out=to_q)
    _turn(grads[1], cos, -sin, out=to_k)
    to_v.copy_(grads[2])
    return packed.view(B, S, 3 * N * K)


@_attention_backward.register_fake
def _(gradient: Tensor, turned: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    _, B, N, S, K = turned.shape
    return turned.new_empty(B, S, 3 * N * K)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cos, sin, _, ctx.scale = inputs
    ctx.save_for_backward(output[1], cos, sin)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for what has none


def _backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None, None
    turned, cos, sin = ctx.saved_tensors
    grad_qkv = torch.ops.toto.blockwise_attention_backward(gradient.contiguous(), turned, cos, sin, ctx.scale)
    return grad_qkv, None, None, None, None


_attention.register_autograd(_backward, setup_context=_keep)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    """Rotate the halves of each head by `[S, K]` angles, whose halves are equal."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, :half].to(x.dtype), sin[:, :half].to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    to_first, to_second = out[..., :half], out[..., half:]
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)


def _grad_scores(q: Tensor, k: Tensor, v: Tensor, future: Tensor, grad_out: Tensor, grad_v: Tensor) -> Tensor:
    """The gradient of a block's scores; that of its values is added to `grad_v`."""
    weights = _weights(q, k, future)
    grad_v.baddbmm_(weights.mT, grad_out)
    grad_weights = torch.bmm(grad_out, v.mT)
    return torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)  # type: ignore[no-any-return]


def _future(positions: int, like: Tensor) -> Tensor:
    """What is added to scores `[queries, queries]` of a block's own positions: minus infinity for later keys."""
    side = min(_side(positions), positions)
    return torch.full((side, side), -torch.inf, dtype=like.dtype, device=like.device).triu(diagonal=1)


def _side(positions: int) -> int:
    """Queries in a block; small ones compute fewer scores in vain, large ones make larger products."""
    return QUERIES if positions >= 8 * QUERIES else QUERIES // 2


def _blocks(heads: int, positions: int) -> Iterator[tuple[slice, slice, slice]]:
    """Some heads, the positions of some queries, and those of all keys up to them."""
    for first in range(0, positions, _side(positions)):
        last = min(first + _side(positions), positions)
        together = max(1, SCORES // ((last - first) * last))
        for head in range(0, heads, together):
            yield slice(head, head + together), slice(first, last), slice(last)


def most_scores(heads: int, positions: int) -> int:
    """How many scores there are at a time, at most; `heads` of all sequences."""
    return max(
        int((min(some.stop, heads) - some.start) * (block.stop - block.start) * seen.stop)
        for some, block, seen in _blocks(heads, positions)
    )


def _weights(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
    """The attention `[heads, queries, keys]` of queries that are the last of the keys' positions."""
    scores, queries = torch.bmm(q, k.mT), q.shape[1]
    scores[:, :, -queries:].add_(future[:queries, :queries])
    return torch.softmax(scores, dim=-1)
