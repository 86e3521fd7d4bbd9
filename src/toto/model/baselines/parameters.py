"""Parameters of the baselines by part, from the structure alone."""

from __future__ import annotations

from toto.model.baselines.config import GPT2Config, MambaConfig


def gpt2_parameters(config: GPT2Config) -> dict[str, int]:
    """GPT-2's; every matrix has a bias, every norm a weight and a bias, positions are not learnt."""
    D, L, M = config.width, config.layers, config.mlp_hidden
    return {
        "embedding": config.vocabulary * D,
        "attention": L * (4 * D * D + 4 * D),
        "mlp": L * (2 * D * M + M + D),
        "norms": (2 * L + 1) * 2 * D,
        "output": 0 if config.tie_embeddings else config.vocabulary * D,
    }


def mamba_parameters(config: MambaConfig) -> dict[str, int]:
    """Mamba's; the state space is what makes steps, B and C of the channels, with A and D."""
    D, L, E, G, R = config.width, config.layers, config.channels, config.state_size, config.step_rank
    return {
        "embedding": config.vocabulary * D,
        "projections": L * 3 * D * E,
        "convolutions": L * E * (config.conv_kernel + 1),
        "state spaces": L * (E * (R + 2 * G) + (R + 1) * E + E * (G + 1)),
        "norms": (L + 1) * D,
        "output": 0 if config.tie_embeddings else config.vocabulary * D,
    }
