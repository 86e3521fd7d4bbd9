"""What a model costs, computed from its structure alone."""

from __future__ import annotations

from toto.model.config import ModelConfig


def parameter_table(config: ModelConfig) -> dict[str, int]:
    """Parameters by part; "total" is last, and counts a tied output layer once."""
    D = config.width
    patches = (config.values_in_patch + 1) * D if config.inputs == "patches" else 0
    biases = config.outputs if config.targets == "pixels" else 0
    parts = {
        "embedding": config.embedded_ids * D + patches,
        "attention": config.layers * 4 * D * D,
        "mlp": config.layers * 3 * D * config.mlp_hidden,
        "norms": (2 * config.layers + 1) * D,
        "output": 0 if config.tie_embeddings else config.outputs * D + biases,
    }
    return parts | {"total": sum(parts.values())}


def parameter_line(config: ModelConfig) -> str:
    """The parameters as one line for people."""
    table = parameter_table(config)
    parts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in table.items() if name != "total")
    return f"{table['total'] / 1e6:.2f}M parameters ({parts})"
