"""Floating-point operations of a training step, from the structure alone.

Matrix products and attention are counted, a multiply-add as two operations; norms, SwiGLU's products, rotations and
the softmax are not (under 1 % of a step). The backward pass of a product is two products of its size, one where its
input needs no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from toto.model.config import BackboneConfig, ModelConfig

Scores = Literal["all", "causal"]


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one pass over some sequences.

    Attributes:
        forward: by part: projections, attention, mlp, output, and patches where these are the input.
        backward: by part; what gradients need, without anything computed again.
        scores_again: what a flash kernel's backward pass adds by computing the scores once more.
    """

    forward: dict[str, int]
    backward: dict[str, int]
    scores_again: int

    @property
    def total(self) -> int:
        """Forward and backward: the operations that utilisation is measured by."""
        return sum(self.forward.values()) + sum(self.backward.values())


def training_flops(config: ModelConfig, *, batch: int, positions: int, scores: Scores = "causal") -> Flops:
    """Operations of one forward and backward pass.

    Args:
        config: the architecture.
        batch: B.
        positions: S, what the model is given of a sequence; its last id is a target only.
        scores: "causal" counts the S (S + 1) / 2 pairs of positions that attend; "all" counts S x S, as
            torch.utils.flop_counter does.
    """
    D, L, tokens = config.width, config.layers, batch * positions
    pairs = positions * positions if scores == "all" else positions * (positions + 1) // 2
    forward = {
        "projections": 2 * tokens * L * 4 * D * D,
        "attention": 2 * batch * L * 2 * pairs * D,
        "mlp": 2 * tokens * L * 3 * D * config.mlp_hidden,
        "output": 2 * tokens * D * config.outputs,
    }
    backward = {part: 2 * count for part, count in forward.items()}
    if config.inputs == "patches":
        patches = tokens - batch  # all positions but the start
        forward["patches"] = backward["patches"] = 2 * patches * config.values_in_patch * D
    return Flops(forward=forward, backward=backward, scores_again=forward["attention"] // 2)


def positions_of(config: BackboneConfig, visual: int) -> int:
    """What the model is given of a sequence with this many visual positions.

    Codes: start and all codes, as the end is a target too. Pixels: without the last patch, a target only.
    """
    return visual if config.targets == "pixels" else visual + 1
