"""Parameters, from the structure alone."""

from __future__ import annotations

from toto.model.baselines.config import GPT2Config, MambaConfig
from toto.model.baselines.parameters import gpt2_parameters, mamba_parameters
from toto.model.config import BackboneConfig, ModelConfig


def parameter_table(config: BackboneConfig) -> dict[str, int]:
    """Parameters by part; "total" is last, and counts a tied output layer once."""
    parts = _parts(config)
    return parts | {"total": sum(parts.values())}


def _parts(config: BackboneConfig) -> dict[str, int]:
    if isinstance(config, GPT2Config):
        return gpt2_parameters(config)
    if isinstance(config, MambaConfig):
        return mamba_parameters(config)
    assert isinstance(config, ModelConfig)
    D = config.width
    patches = (config.values_in_patch + 1) * D if config.inputs == "patches" else 0
    biases = config.outputs if config.targets == "pixels" else 0
    return {
        "embedding": config.embedded_ids * D + patches,
        "attention": config.layers * 4 * D * D,
        "mlp": config.layers * 3 * D * config.mlp_hidden,
        "norms": (2 * config.layers + 1) * D,
        "output": 0 if config.tie_embeddings else config.outputs * D + biases,
    }


def parameter_line(config: BackboneConfig) -> str:
    """The parameters as one line for people."""
    table = parameter_table(config)
    parts = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in table.items() if name != "total")
    return f"{table['total'] / 1e6:.2f}M parameters ({parts})"
