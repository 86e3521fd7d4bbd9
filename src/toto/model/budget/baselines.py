"""Operations of the baselines' training steps, from the structure alone.

As in `toto.model.budget.flops`, matrix products and attention are counted. Mamba's scan is element by element but for
the product that reads its states; how much that leaves out is `uncounted_share`.
"""

from __future__ import annotations

from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.budget.flops import Flops, Scores

SCAN_OPERATIONS = 6  # of a state's number, forward: its step times A, exp, its input times B, and the recurrence

BaselineConfig = GPT2Config | MambaConfig


def baseline_flops(config: BaselineConfig, *, batch: int, positions: int, scores: Scores = "causal") -> Flops:
    """Operations of one forward and backward pass; see `toto.model.budget.flops.training_flops`.

    Computing chunks of Mamba's scan again, which it does at long sequences to save memory, is left out.
    """
    tokens = batch * positions
    output = {"output": 2 * tokens * config.width * config.vocabulary}
    if isinstance(config, GPT2Config):
        forward = _gpt2(config, batch, positions, scores) | output
        scores_again = forward["attention"] // 2
    else:
        forward, scores_again = _mamba(config, tokens) | output, 0
    backward = {part: 2 * count for part, count in forward.items()}
    return Flops(forward=forward, backward=backward, scores_again=scores_again)


def uncounted_share(config: BaselineConfig) -> float:
    """The scan's operations, element by element, as a share of those of the forward pass that are counted."""
    if isinstance(config, GPT2Config):
        return 0.0
    scan = SCAN_OPERATIONS * config.layers * config.channels * config.state_size
    return scan / sum(baseline_flops(config, batch=1, positions=1).forward.values())


def _gpt2(config: GPT2Config, batch: int, positions: int, scores: Scores) -> dict[str, int]:
    D, L, tokens = config.width, config.layers, batch * positions
    pairs = positions * positions if scores == "all" else positions * (positions + 1) // 2
    return {
        "projections": 2 * tokens * L * 4 * D * D,
        "attention": 2 * batch * L * 2 * pairs * D,
        "mlp": 2 * tokens * L * 2 * D * config.mlp_hidden,
    }


def _mamba(config: MambaConfig, tokens: int) -> dict[str, int]:
    D, L, E, G, R = config.width, config.layers, config.channels, config.state_size, config.step_rank
    return {
        "projections": 2 * tokens * L * 3 * D * E,
        "state spaces": 2 * tokens * L * (E * (R + 2 * G) + R * E + E * G),
    }
