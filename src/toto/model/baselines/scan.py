"""Mamba's selective scan in plain torch, a chunk of positions at a time.

    h[t] = exp(dt[t] a) h[t - 1] + dt[t] b[t] u[t]        y[t] = c[t] h[t]

Everything but the recurrence is done for a whole chunk at once. The recurrence itself, of numbers that no longer depend
on each other's channels, is one fused product and sum a position, forward and backward; autograd sees it as one node.
Nothing is divided or taken out of logarithms, so results equal the plain loop's within rounding.

Dimensions beside the usual: E channels, G numbers of a channel's state.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64
KEPT_BYTES = 1 << 26  # states of one layer that are kept for the backward pass; larger ones are computed again


def selective_scan(
    u: Float[Tensor, "B S E"],
    dt: Float[Tensor, "B S E"],
    a: Float[Tensor, "E G"],
    b: Float[Tensor, "B S G"],
    c: Float[Tensor, "B S G"],
    state: Float[Tensor, "B E G"],
) -> tuple[Float[Tensor, "B S E"], Float[Tensor, "B E G"]]:
    """The outputs of all positions, and the state after the last one; in fp32."""
    again = torch.is_grad_enabled() and u.numel() * a.shape[1] * 4 > KEPT_BYTES
    chunks = [value.float().split(CHUNK, dim=1) for value in (u, dt, b, c)]  # type: ignore[no-untyped-call]
    parts: list[Tensor] = []
    for each_u, each_dt, each_b, each_c in zip(*chunks, strict=True):
        chunk = (each_u, each_dt, each_b, each_c, a, state)
        out, state = _again(*chunk) if again else _scan_chunk(*chunk)
        parts.append(out)
    return torch.cat(parts, dim=1), state


def _again(*chunk: Tensor) -> tuple[Tensor, Tensor]:
    """`_scan_chunk`, computed once more in the backward pass; nothing in it is drawn."""
    found: tuple[Tensor, Tensor] = checkpoint(_scan_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
    return found


def _scan_chunk(u: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.exp(dt[..., None] * a)
    added = (dt * u)[..., None] * b[:, :, None, :]
    states, last = _Recurrence.apply(kept, added, state)  # type: ignore[no-untyped-call]
    return (states @ c[..., None]).squeeze(-1), last


class _Recurrence(torch.autograd.Function):
    """h[t] = kept[t] x h[t - 1] + added[t], element by element; `first` is h before the chunk.

    Gives all states, and the last one as a copy: who holds that doesn't hold all.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, added: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        states = torch.empty_like(added)
        before = first
        for factor, new, state in zip(kept.unbind(1), added.unbind(1), states.unbind(1), strict=True):
            before = torch.addcmul(new, factor, before, out=state)
        ctx.save_for_backward(kept, states, first)
        return states, before.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, states, first = ctx.saved_tensors
        through = grads[0].clone(memory_format=torch.contiguous_format)
        through[:, -1].add_(grads[1])
        steps, factors = through.unbind(1), kept.unbind(1)
        for position in range(len(steps) - 1, 0, -1):
            steps[position - 1].addcmul_(factors[position], steps[position])
        of_kept = torch.empty_like(kept)
        torch.mul(through[:, 0], first, out=of_kept[:, 0])
        torch.mul(through[:, 1:], states[:, :-1], out=of_kept[:, 1:])
        return of_kept, through, kept[:, 0] * through[:, 0]
